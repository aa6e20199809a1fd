// What a reader does with a route view: sliders, pointer, keyboard, search, samples, and the page's address.

const Controls = {
  prepare(v) {
    const part = v.part, change = (name, key, number) => part(name).addEventListener("input", (event) => {
      v.shared[key] = number ? Number(event.target.value) : event.target.value;
      schedule();
    });
    for (const name of ["width", "share", "rows"]) change(name, name, true);
    change("order", "order", false);
    for (const name of ["pair-slider", "pair-list"]) part(name).addEventListener("input", (event) => { v.own.pair = Number(event.target.value); Controls.offer(v); schedule(); });
    part("influence").addEventListener("input", (event) => { v.own.side = event.target.value; schedule(); });
    part("search").addEventListener("input", (event) => Controls.search(v, event.target.value));
    const { layers, edges } = v.data, pairs = v.setup.pairs;
    part("width").disabled = !layers.some((layer) => layer.frequency.some(Boolean));
    for (const by of ["gradient", "sensitivity"]) {
      part("order").querySelector(`[value=${by}]`).disabled = !layers.some((layer) => layer[by].some(Boolean));
    }
    part("pair").hidden = pairs.length < 2;
    part("pair-name").textContent = v.setup.control;
    part("pair-slider").hidden = v.setup.control !== "eps";
    part("pair-list").hidden = v.setup.control === "eps";
    part("pair-slider").max = String(pairs.length - 1);
    part("pair-list").replaceChildren(...pairs.map((pair, index) => html("option", pair.label, { value: String(index) })));
    for (const item of v.root.querySelectorAll("[data-shared]")) item.hidden = v.setup.linked;
    part("controls").hidden = v.setup.linked && part("pair").hidden;
    part("dashes").hidden = !edges.length;
    part("arcs").hidden = !edges.some((edge) => edge.target - edge.source > 1);
    part("panel").hidden = false;
    Controls.offer(v);
    Controls.listen(v);
    Controls.samples(v);
  },

  offer(v) {  // whose influence can be drawn under the pair chosen
    const sides = Columns.sides(v), known = ["first", "second"].filter((side) => sides[side] !== null && v.data.edges.some((edge) => edge.influence[sides[side]]));
    if (!known.includes(v.own.side)) v.own.side = known[0] || "first";
    const list = v.part("influence");
    list.replaceChildren(...known.map((side) => html("option", v.data.conditions[sides[side]].name, { value: side })));
    list.value = v.own.side;
    v.part("influence-label").hidden = known.length < 2;
    v.part("share").disabled = !known.length;
    for (const side of ["first", "second"]) v.part(`legend-${side}`).hidden = !Columns.has(v, side) || (side === "first" && !Columns.has(v, "second"));
    v.part("legend-both").hidden = !(Columns.has(v, "first") && Columns.has(v, "second"));
    v.part("legend-ring").hidden = !v.data.samples.length;
    for (const kind of ["first", "second", "both"]) v.part(`legend-${kind}`).lastChild.textContent = v.setup[kind];
  },

  listen(v) {
    const at = (event) => {
      const group = event.target.closest && event.target.closest(".node");
      return group ? Drawing.find(v, group.dataset.key) : null;
    };
    v.svg.addEventListener("pointerover", (event) => { const node = at(event); if (node) Panel.pick(v, node); });
    v.svg.addEventListener("pointerleave", () => Panel.pick(v, v.shared.channel));
    v.svg.addEventListener("click", (event) => { const node = at(event); if (node) Controls.keep(v, node); });
    v.svg.addEventListener("focusin", (event) => { const node = at(event); if (node) { v.focused = Drawing.key(node); Panel.pick(v, node); } });
    v.svg.addEventListener("keydown", (event) => { const node = at(event); if (node) Controls.press(v, event, node); });
  },

  press(v, event, node) {
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (event.key === "Enter" || event.key === " ") { Controls.keep(v, node); Controls.refocus(v); }
    else if (event.key === "Escape") { v.shared.channel = null; renderAll(); writeHash(); Controls.refocus(v); }
    else if (step) {
      const row = v.columns[node.layer].nodes.indexOf(node), next = v.columns[node.layer + step[0]];
      if (next && next.nodes.length) {
        const to = next.nodes[Math.min(next.nodes.length - 1, Math.max(0, row + step[1]))];
        node.element.setAttribute("tabindex", "-1");
        to.element.setAttribute("tabindex", "0");
        to.element.focus();
      }
    } else return;
    event.preventDefault();
  },

  refocus(v) { const node = Drawing.find(v, v.focused); if (node) node.element.focus(); },

  keep(v, node) {
    v.shared.channel = node && !same(node, v.shared.channel) ? { layer: node.layer, channel: node.channel } : null;
    if (v.shared.channel) v.focused = Drawing.key(v.shared.channel);
    renderAll();
    writeHash();
  },

  search(v, text) {
    const note = v.part("found"), { layers } = v.data, match = /^(.*?)[\s:#]*(\d+)$/.exec(text.trim());
    if (!text.trim()) { note.textContent = ""; return; }
    if (!match) { note.textContent = "Write a layer and a channel, as in conv1 12."; return; }
    // a layer's name may end in digits too: the whole text before the number must be part of it
    const channel = Number(match[2]), named = match[1].trim();
    const index = layers.findIndex((layer) => layer.name.endsWith(named) && channel < layer.channels);
    const loose = index >= 0 ? index : layers.findIndex((layer) => layer.name.includes(named) && channel < layer.channels);
    if (loose < 0) { note.textContent = "No such channel."; return; }
    note.textContent = `${layers[loose].name} ${channel}`;
    v.shared.channel = { layer: loose, channel };
    v.focused = Drawing.key(v.shared.channel);
    renderAll();
    writeHash();
    const node = Drawing.find(v, v.focused);
    if (node) v.part("scroll").scrollLeft = Math.max(0, node.x - 120);
  },

  samples(v) {
    const { samples, pictures, classes, conditions } = v.data, list = v.part("samples");
    const name = (label) => (classes[label] === undefined ? String(label) : classes[label]);
    v.part("samples-part").hidden = v.setup.linked || !samples.length;
    if (v.setup.linked) return;
    samples.forEach((sample, number) => {
      const button = html("button", undefined, { type: "button", "data-sample": String(number), "aria-pressed": "false" });
      if (sample.picture !== null) button.append(html("img", undefined, { src: pictures[sample.picture], alt: "" }));
      const caption = html("span", `${sample.row}: ${sample.label === null ? "?" : name(sample.label)}`);
      const wrong = sample.predictions.map((found, at) => [found, at]).filter(([found]) => found !== null && found !== sample.label);
      if (wrong.length) {
        caption.append(html("span", ` → ${[...new Set(wrong.map(([found]) => name(found)))].join(", ")}`, { class: "wrong" }));
        button.title = wrong.map(([found, at]) => `${conditions[at].name}: ${name(found)}`).join("; ");
      }
      button.append(caption);
      button.addEventListener("click", () => { v.shared.sample = v.shared.sample === number ? null : number; renderAll(); writeHash(); });
      const entry = html("li");
      entry.append(button);
      list.append(entry);
    });
  },

  show(v) {  // the controls as the state has them
    for (const name of ["width", "share", "rows", "order"]) v.part(name).value = String(v.shared[name]);
    for (const name of ["pair-slider", "pair-list"]) v.part(name).value = String(v.own.pair);
    v.part("influence").value = v.own.side;
    v.part("width-value").textContent = percent(v.shared.width, 0);
    v.part("share-value").textContent = percent(v.shared.share, 0);
    const label = v.setup.control === "eps" ? Columns.pair(v).label : "";
    v.part("pair-value").textContent = label;
    v.part("pair-slider").setAttribute("aria-valuetext", label);
  },
};
