// What a route view says of the channel under the pointer, and of the whole.

const RARE = "Not in this page, which keeps the edges of the channels that samples use most.";

const Panel = {
  spoken(v, node) {
    const layer = v.data.layers[node.layer], sides = Columns.sides(v), words = { ...v.setup, own: "off the model's route" };
    const often = [sides.first, sides.second].filter((at) => at !== null && layer.frequency[at])
      .map((at) => `on ${percent(layer.frequency[at][node.channel])} of the routes of ${v.data.conditions[at].name}`);
    return [`${layer.name} channel ${node.channel}`, words[node.kind], ...often].join(", ");
  },

  pick(v, node) {  // what is under the pointer, has the focus, or was clicked
    v.groups.picked.replaceChildren();
    v.svg.classList.toggle("picking", Boolean(node));
    v.svg.querySelectorAll(".picked").forEach((item) => item.classList.remove("picked"));
    if (!node) { Panel.describe(v, null); return; }
    const incoming = Columns.neighbours(v, node, true), outgoing = Columns.neighbours(v, node, false);
    const me = Drawing.find(v, Drawing.key(node));
    if (me) {
      me.element.classList.add("picked");
      const most = Math.max(...[...incoming, ...outgoing].map((item) => item.share));
      for (const [list, into] of [[incoming, true], [outgoing, false]]) {
        for (const item of list) {
          const place = Drawing.find(v, Drawing.key(item.other));
          const other = place || { x: LEFT + item.other.layer * v.column, y: v.height - 8 };
          if (place) place.element.classList.add("picked");
          v.groups.picked.append(drawn("path", {
            class: `edge ${place ? "strong" : "strong off"} w${Math.max(1, Math.ceil((LEVELS * item.share) / most))}`,
            d: into ? Drawing.curve(other, me) : Drawing.curve(me, other),
          }));
        }
      }
    }
    Panel.describe(v, node, incoming, outgoing);
  },

  describe(v, node, incoming, outgoing) {
    const panel = v.part("channel");
    if (!node) {
      panel.replaceChildren(html("p", "Point at a channel to see how often samples use it, how strongly an attack moves it, and its strongest edges. Click to keep it, Escape to let go; the arrow keys move."));
      return;
    }
    const layer = v.data.layers[node.layer], parts = [html("h3", `${layer.name}, channel ${node.channel}`), Panel.numbers(v, node)];
    if (!Panel.measured(v)) parts.push(html("p", "Its influence was not measured."));
    else {
      const joined = (end) => v.data.edges.some((edge) => edge[end] === node.layer);
      parts.push(...Panel.listing(v, "Strongest in", incoming, "share of the influence that arrives here",
        joined("target") ? RARE : "This layer reads the image."));
      parts.push(...Panel.listing(v, "Strongest out", outgoing, "share of the influence that arrives there",
        joined("source") ? RARE : "No route layer follows, only the logits."));
    }
    panel.replaceChildren(...parts);
  },

  measured(v) {
    const at = Columns.influence(v);
    return at !== null && at !== undefined && v.data.edges.some((edge) => edge.influence[at]);
  },

  numbers(v, node) {  // a column a condition
    const layer = v.data.layers[node.layer], sides = Columns.sides(v);
    const shown = ["first", "second"].filter((side) => Columns.has(v, side));
    const table = html("table", undefined, { class: "facts" }), head = html("tr");
    head.append(html("td", ""), ...shown.map((side) => html("th", breakable(v.data.conditions[sides[side]].name), { scope: "col" })));
    table.append(head);
    const row = (name, title, tell) => {
      const cells = shown.map((side) => tell(sides[side], side));
      if (cells.every((cell) => cell === null)) return;
      const made = html("tr");
      made.append(html("th", name, { scope: "row", title }), ...cells.map((cell) => html("td", cell === null ? "–" : cell)));
      table.append(made);
    };
    const ranked = (by, show) => (at) => {
      const values = layer[by][at];
      return values ? `${show(values[node.channel])}, rank ${Columns.ranked(v, node.layer, at, by).indexOf(node.channel) + 1}` : null;
    };
    row("on the model's route", "at the width of the slider", (_, side) => (Columns.chosen(v, node.layer, side).has(node.channel) ? "yes" : "no"));
    row("on samples' routes", "share of the samples, and rank in the layer", ranked("frequency", (value) => percent(value)));
    row("sensitivity", "mean |Z(x') - Z(x)| over images and positions, and rank in the layer", ranked("sensitivity", brief));
    row("gradient", "mean over images of the sum over positions of |dL/dZ|, and rank in the layer", ranked("gradient", brief));
    const note = html("p", `Ranks are among the layer's ${layer.channels} channels.`, { class: "quiet" });
    const box = html("div");
    box.append(table, note);
    return box;
  },

  listing(v, title, items, of, none) {
    if (!items.length) return [html("h4", title), html("p", none)];
    const heading = html("h4", title);
    heading.append(html("span", ` ${of}`, { class: "quiet" }));
    const list = html("ol");
    for (const item of items) {
      const entry = html("li"), button = html("button", `${v.data.layers[item.other.layer].name} ${item.other.channel}`, { type: "button" });
      button.addEventListener("click", () => Controls.keep(v, item.other));
      entry.append(button, ` ${percent(item.share)}`);
      list.append(entry);
    }
    return [heading, list];
  },

  mark(v) {
    Panel.pick(v, v.shared.channel);
    for (const button of v.root.querySelectorAll("[data-sample]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.sample) === v.shared.sample));
    }
    const node = v.shared.channel && Drawing.find(v, Drawing.key(v.shared.channel));
    if (node) node.element.setAttribute("aria-pressed", "true");
  },

  say(v) {
    const parts = [], { layers } = v.data, sides = Columns.sides(v);
    const known = (at) => at !== null && layers.every((layer) => layer.frequency[at]);
    if (known(sides.first) || known(sides.second)) parts.push(`The route holds the most frequent ${percent(v.shared.width, 0)} of each layer's channels.`);
    if (known(sides.first) && known(sides.second)) {
      let both = 0, all = 0;
      layers.forEach((_, index) => {
        const first = Columns.chosen(v, index, "first"), second = Columns.chosen(v, index, "second");
        all += new Set([...first, ...second]).size;
        both += [...first].filter((channel) => second.has(channel)).length;
      });
      parts.push(`The routes of ${v.data.conditions[sides.first].name} and of ${v.data.conditions[sides.second].name} share ${both} of ${all} channels that are on either.`);
    }
    if (v.shared.sample !== null) {
      const own = v.columns.reduce((sum, item) => sum + item.size, 0), agreed = v.columns.reduce((sum, item) => sum + item.agreed, 0);
      parts.push(own ? `Of this sample's ${own} channels ${agreed} are on the model's route.` : "This sample has no route here.");
    }
    v.part("says").textContent = parts.join(" ");
  },
};
