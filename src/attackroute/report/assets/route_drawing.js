// The drawing: columns of channels and the influence between them, as SVG.
// Drawn by hand: plotting libraries weigh 1.5 to 5 MB a page, and none serves a layered graph of channels that is read by
// keyboard and from a file. Nothing is fetched; all data lie in the page.

const LEVELS = 5;

const Drawing = {
  render(v) {
    v.sets.clear();
    const { layers, edges } = v.data;
    const room = (v.part("scroll").clientWidth - 2 * LEFT) / Math.max(1, layers.length - 1);
    v.column = Math.round(Math.min(200, Math.max(118, room)));
    v.columns = layers.map((_, index) => Columns.make(v, index, v.column));
    const tallest = Math.max(...v.columns.map((item) => item.nodes.length));
    const span = Math.max(0, ...edges.map((edge) => edge.target - edge.source));
    const sky = span > 1 ? Math.min(100, 24 + 8 * span) : 8, top = sky + HEAD;
    for (const item of v.columns) for (const node of item.nodes) node.y += top;
    const size = [2 * LEFT + (layers.length - 1) * v.column, top + (tallest + 3) * ROW];
    v.svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
    v.svg.setAttribute("width", size[0]);
    v.svg.setAttribute("height", size[1]);
    v.height = size[1];
    v.groups = { edges: drawn("g", { class: "edges" }), own: drawn("g", { class: "own-edges" }), picked: drawn("g", { class: "picked-edges" }) };
    Drawing.joined(v, v.groups.edges, (node) => node.kind !== "own", Drawing.edgeKind);
    if (v.shared.sample !== null) Drawing.joined(v, v.groups.own, (node) => node.onSample, () => "sample");
    v.svg.replaceChildren(Drawing.skips(v, sky), v.groups.edges, v.groups.own, v.groups.picked, Drawing.heads(v, sky), Drawing.nodes(v));
    Panel.say(v);
    Panel.mark(v);
  },

  joined(v, group, wanted, kindOf) {
    for (const edge of v.data.edges) {
      if (edge.target - edge.source === 1) Drawing.bundles(group, Columns.pairs(v, edge, wanted), kindOf);
    }
  },

  heads(v, sky) {
    const group = drawn("g", { class: "heads" }), sides = Columns.sides(v);
    v.data.layers.forEach((layer, index) => {
      const x = LEFT + index * v.column;
      const name = drawn("text", { x, y: sky + 14, class: "layer" }, short(layer.name));
      name.append(drawn("title", {}, layer.name));
      group.append(name);
      const first = Columns.chosen(v, index, "first"), second = Columns.chosen(v, index, "second");
      const both = [...first].filter((channel) => second.has(channel)).length, most = Math.max(first.size, second.size);
      const two = sides.second !== null && layer.frequency[sides.first] && layer.frequency[sides.second];
      group.append(drawn("text", { x, y: sky + 29, class: "count" }, two ? `${both} of ${most} shared` : `${most} of ${layer.channels}`));
      const item = v.columns[index], bottom = item.nodes.length ? item.nodes[item.nodes.length - 1].y + ROW + 3 : sky + HEAD;
      if (item.hidden > 0) group.append(drawn("text", { x, y: bottom, class: "count" }, `+ ${item.hidden} more`));
      if (item.size) group.append(drawn("text", { x, y: bottom + (item.hidden > 0 ? 13 : 0), class: "count own" }, `sample: ${item.agreed} of ${item.size}`));
    });
    return group;
  },

  nodes(v) {
    const group = drawn("g", { class: "nodes" });
    for (const item of v.columns) for (const node of item.nodes) {
      const made = drawn("g", {
        class: `node ${node.kind}${node.onSample ? " on-sample" : ""}`, transform: `translate(${node.x},${node.y})`,
        role: "button", tabindex: "-1", "data-key": Drawing.key(node), "aria-label": Panel.spoken(v, node),
      });
      made.append(drawn("rect", { x: -30, y: -7.5, width: 50, height: 15, class: "target" }));
      if (node.onSample) made.append(drawn("circle", { r: 7, class: "ring" }));
      made.append(Drawing.shape(node.kind), drawn("text", { x: -10, y: 3.5, class: "number" }, String(node.channel)));
      node.element = made;
      group.append(made);
    }
    const first = v.columns.find((item) => item.nodes.length);
    const at = Drawing.find(v, v.focused) || (first && first.nodes[0]);
    if (at) at.element.setAttribute("tabindex", "0");
    return group;
  },

  shape(kind) {  // colour is never the only sign
    if (kind === "second") return drawn("path", { d: "M0-5.2 5.2 0 0 5.2-5.2 0Z", class: "mark" });
    if (kind === "both") return drawn("rect", { x: -4.2, y: -4.2, width: 8.4, height: 8.4, class: "mark" });
    return drawn("circle", { r: 4.3, class: "mark" });
  },

  curve(from, to) {
    const middle = (from.x + 12 + to.x - 26) / 2;
    return `M${from.x + 7} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x - (to.kind ? 24 : 0)} ${to.y}`;
  },

  edgeKind(a, b) {
    if (a.kind === b.kind) return a.kind;
    if (a.kind === "both") return b.kind;
    if (b.kind === "both") return a.kind;
    return "mixed";
  },

  bundles(group, pairs, kindOf) {  // a handful of paths, not one a pair: large networks stay quick
    if (!pairs.length) return;
    const most = pairs[0][2], paths = new Map();
    for (const [a, b, value] of pairs) {
      const name = `edge ${kindOf(a, b)} w${Math.max(1, Math.ceil((LEVELS * value) / most))}`;
      paths.set(name, (paths.get(name) || "") + Drawing.curve(a, b));
    }
    for (const [name, d] of paths) group.append(drawn("path", { class: name, d }));
  },

  skips(v, sky) {
    const group = drawn("g", { class: "skips" }), { edges, layers } = v.data, at = Columns.influence(v);
    const known = (edge) => (at === null || at === undefined ? null : edge.influence[at]);
    for (const edge of edges) {
      const span = edge.target - edge.source;
      if (span < 2) continue;
      const all = edges.filter((other) => other.target === edge.target).reduce((sum, other) => sum + (known(other) ? known(other).total : 0), 0);
      const values = known(edge), share = values && all > 0 ? values.total / all : null;
      const x = [LEFT + edge.source * v.column, LEFT + edge.target * v.column], high = Math.max(2, sky - 12 - 8 * span);
      const path = drawn("path", {
        class: share === null ? "skip unmeasured" : "skip", d: `M${x[0]} ${sky}C${x[0]} ${high} ${x[1]} ${high} ${x[1]} ${sky}`,
        "stroke-width": share === null ? 1 : (1 + 6 * share).toFixed(1),
      });
      const what = share === null ? "not measured" : `${percent(share)} of what arrives there`;
      path.append(drawn("title", {}, `${layers[edge.source].name} to ${layers[edge.target].name}: ${what}`));
      group.append(path);
    }
    return group;
  },

  key(node) { return `${node.layer}:${node.channel}`; },

  find(v, name) {
    if (name === null) return null;
    for (const item of v.columns) for (const node of item.nodes) if (Drawing.key(node) === name) return node;
    return null;
  },
};
