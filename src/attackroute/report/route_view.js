// The route view: columns of channels, the influence between them, and what a reader can ask of it.
// Drawn by hand as SVG: plotting libraries weigh 1.5 to 5 MB a page, and none serves a layered graph of channels that is
// read by keyboard and from a file. Nothing is fetched; all data lie in the page.

const KINDS = { clean: "clean only", attacked: "attacked only", shared: "clean and attacked", own: "off the model's route" };
const STRONGEST = 5, PAIRS = 150, LEVELS = 5;
const ROW = 15, LEFT = 54, HEAD = 46;

function routeView(view) {
  const svg = byId("route-svg");
  const layers = view.layers, edges = view.edges;
  const has = (kind) => layers.some((layer) => layer[kind]);
  const measured = ["clean", "attacked"].filter((kind) => edges.some((edge) => edge[kind]));
  const state = { width: view.width, rows: 20, share: 0.3, influence: measured[0] || null, channel: null, sample: null };
  let columns = [], COLUMN = 118, focused = null, scheduled = false;
  const sets = new Map();  // of one drawing

  const ranks = layers.map((layer) => {
    const ranked = {};
    for (const kind of ["clean", "attacked"]) if (layer[kind]) ranked[kind] = order(layer[kind]);
    return ranked;
  });

  byId("route-controls").hidden = false;
  byId("route-panel").hidden = false;
  prepareControls();
  readHash();
  render();
  addEventListener("hashchange", () => { readHash(); render(); });
  addEventListener("resize", schedule);

  // --- numbers

  function chosen(index, kind) {  // the model's route at the slider's width
    const name = `${kind} ${index}`;
    if (!sets.has(name)) sets.set(name, new Set(members(index, kind)));
    return sets.get(name);
  }

  function members(index, kind) {
    const layer = layers[index], ranked = ranks[index][kind];
    if (ranked) return ranked.slice(0, kept(state.width, layer.channels));
    return kind === "clean" && layer.route && !has("attacked") ? layer.route : [];
  }

  function frequency(index, channel) {
    const layer = layers[index];
    return Math.max(...["clean", "attacked"].map((kind) => (layer[kind] ? layer[kind][channel] : 0)));
  }

  // --- columns

  function column(index) {
    const clean = chosen(index, "clean"), attacked = chosen(index, "attacked");
    const kind = (channel) =>
      clean.has(channel) ? (attacked.has(channel) ? "shared" : "clean") : attacked.has(channel) ? "attacked" : "own";
    const own = sampleRoute(index);
    const route = [...new Set([...clean, ...attacked])]
      .sort((a, b) => frequency(index, b) - frequency(index, a) || a - b);
    const shown = route.slice(0, state.rows);
    const others = own ? [...own].filter((channel) => kind(channel) === "own") : [];
    const extra = others.slice(0, Math.ceil(state.rows / 2));
    const pinned = state.channel && state.channel.layer === index ? state.channel.channel : null;
    const list = [...shown, ...extra];
    if (pinned !== null && !list.includes(pinned)) list.push(pinned);
    return {
      nodes: list.map((channel, row) => ({
        layer: index, channel, kind: kind(channel), onSample: own !== null && own.has(channel),
        x: LEFT + index * COLUMN, y: row * ROW,
      })),
      hidden: route.length - shown.length,
      agreed: own ? [...own].filter((channel) => kind(channel) !== "own").length : 0,
      size: own ? own.size : 0,
    };
  }

  function sampleRoute(index) {
    if (state.sample === null) return null;
    const routes = view.samples[state.sample].routes;
    const list = routes[state.influence] || routes.clean || routes.attacked;
    return new Set(list[index]);
  }

  // --- drawing

  function element(name, attributes, text) {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function render() {
    sets.clear();
    const room = (byId("route-scroll").clientWidth - 2 * LEFT) / Math.max(1, layers.length - 1);
    COLUMN = Math.round(Math.min(200, Math.max(118, room)));
    columns = layers.map((_, index) => column(index));
    const tallest = Math.max(...columns.map((item) => item.nodes.length));
    const spans = edges.map((edge) => edge.target - edge.source);
    const sky = Math.max(...spans, 0) > 1 ? Math.min(100, 24 + 8 * Math.max(...spans)) : 8;
    const top = sky + HEAD;
    for (const item of columns) for (const node of item.nodes) node.y += top;
    const size = [2 * LEFT + (layers.length - 1) * COLUMN, top + (tallest + 2) * ROW];
    svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
    svg.setAttribute("width", size[0]);
    svg.setAttribute("height", size[1]);
    svg.replaceChildren(
      skips(sky), pairPaths(), element("g", { id: "own-edges" }), element("g", { id: "picked-edges" }), heads(sky), nodes());
    if (state.sample !== null) ownEdges();
    say();
    mark();
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    setTimeout(() => { scheduled = false; render(); writeHash(); }, 16);  // one drawing for many moves of the slider
  }

  function heads(sky) {
    const group = element("g", { class: "heads" });
    layers.forEach((layer, index) => {
      const x = LEFT + index * COLUMN;
      const name = element("text", { x, y: sky + 14, class: "layer" }, short(layer.name));
      name.append(element("title", {}, layer.name));
      group.append(name);
      const clean = chosen(index, "clean"), attacked = chosen(index, "attacked");
      const both = [...clean].filter((channel) => attacked.has(channel)).length;
      const count = ranks[index].clean && ranks[index].attacked
        ? `${both} of ${Math.max(clean.size, attacked.size)} shared` : `${Math.max(clean.size, attacked.size)} of ${layer.channels}`;
      group.append(element("text", { x, y: sky + 29, class: "count" }, count));
      const item = columns[index], bottom = item.nodes.length ? item.nodes[item.nodes.length - 1].y + ROW + 3 : sky + HEAD;
      if (item.hidden > 0) group.append(element("text", { x, y: bottom, class: "count" }, `+ ${item.hidden} more`));
      if (item.size) group.append(element("text", { x, y: bottom + (item.hidden > 0 ? 13 : 0), class: "count own" }, `sample: ${item.agreed} of ${item.size}`));
    });
    return group;
  }

  function nodes() {
    const group = element("g", { class: "nodes" });
    for (const item of columns) for (const node of item.nodes) {
      const made = element("g", {
        class: `node ${node.kind}${node.onSample ? " on-sample" : ""}`, transform: `translate(${node.x},${node.y})`,
        role: "button", tabindex: "-1", "data-key": key(node), "aria-label": spoken(node),
      });
      made.append(element("rect", { x: -30, y: -7.5, width: 50, height: 15, class: "target" }));
      if (node.onSample) made.append(element("circle", { r: 7, class: "ring" }));
      made.append(shape(node.kind), element("text", { x: -10, y: 3.5, class: "number" }, String(node.channel)));
      node.element = made;
      group.append(made);
    }
    const first = columns.find((item) => item.nodes.length);
    const at = find(focused) || (first && first.nodes[0]);
    if (at) at.element.setAttribute("tabindex", "0");
    return group;
  }

  function shape(kind) {  // colour is never the only sign
    if (kind === "attacked") return element("path", { d: "M0-5.2 5.2 0 0 5.2-5.2 0Z", class: "mark" });
    if (kind === "shared") return element("rect", { x: -4.2, y: -4.2, width: 8.4, height: 8.4, class: "mark" });
    return element("circle", { r: 4.3, class: "mark" });
  }

  function curve(from, to) {
    const middle = (from.x + 12 + to.x - 26) / 2;
    return `M${from.x + 7} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x - (to.kind ? 24 : 0)} ${to.y}`;
  }

  function edgeKind(a, b) {
    if (a.kind === "own" || b.kind === "own") return "own";
    if (a.kind === b.kind) return a.kind;
    if (a.kind === "shared") return b.kind;
    if (b.kind === "shared") return a.kind;
    return "mixed";
  }

  function shownPairs(edge, wanted) {  // strongest first, up to the share of what is between the shown channels
    const values = state.influence && edge[state.influence];
    if (!values) return [];
    const place = (index) => new Map(columns[index].nodes.filter(wanted).map((node) => [node.channel, node]));
    const from = place(edge.source), to = place(edge.target), found = [];
    let total = 0;
    for (let i = 0; i < values.influence.length; i++) {
      const a = from.get(values.sources[i]), b = to.get(values.targets[i]);
      if (a && b) { found.push([a, b, values.influence[i]]); total += values.influence[i]; }
    }
    let sum = 0;
    const cut = found.findIndex((pair) => (sum += pair[2]) >= state.share * total);
    return found.slice(0, Math.min(PAIRS, cut < 0 ? found.length : cut + 1));
  }

  function bundles(group, pairs, kindOf) {  // a handful of paths, not one a pair: large networks stay quick
    if (!pairs.length) return;
    const most = pairs[0][2], paths = new Map();
    for (const [a, b, value] of pairs) {
      const level = Math.max(1, Math.ceil((LEVELS * value) / most));
      const name = `edge ${kindOf(a, b)} w${level}`;
      paths.set(name, (paths.get(name) || "") + curve(a, b));
    }
    for (const [name, d] of paths) group.append(element("path", { class: name, d }));
  }

  function pairPaths() {
    const group = element("g", { id: "edges" });
    for (const edge of edges) {
      if (edge.target - edge.source === 1) bundles(group, shownPairs(edge, (node) => node.kind !== "own"), edgeKind);
    }
    return group;
  }

  function ownEdges() {
    const group = byId("own-edges");
    for (const edge of edges) {
      if (edge.target - edge.source === 1) bundles(group, shownPairs(edge, (node) => node.onSample), () => "sample");
    }
  }

  function skips(sky) {
    const group = element("g", { class: "skips" });
    for (const edge of edges) {
      const span = edge.target - edge.source;
      if (span < 2) continue;
      const into = edges.filter((other) => other.target === edge.target);
      const values = state.influence && edge[state.influence];
      const all = into.reduce((sum, other) => sum + (state.influence && other[state.influence] ? other[state.influence].total : 0), 0);
      const share = values && all > 0 ? values.total / all : null;
      const x = [LEFT + edge.source * COLUMN, LEFT + edge.target * COLUMN], high = Math.max(2, sky - 12 - 8 * span);
      const path = element("path", {
        class: share === null ? "skip unmeasured" : "skip", d: `M${x[0]} ${sky}C${x[0]} ${high} ${x[1]} ${high} ${x[1]} ${sky}`,
        "stroke-width": share === null ? 1 : (1 + 6 * share).toFixed(1),
      });
      const what = share === null ? "not measured" : `${percent(share)} of what arrives there`;
      path.append(element("title", {}, `${layers[edge.source].name} to ${layers[edge.target].name}: ${what}`));
      group.append(path);
    }
    return group;
  }

  // --- one channel

  function key(node) { return `${node.layer}:${node.channel}`; }
  function find(name) {
    if (name === null) return null;
    for (const item of columns) for (const node of item.nodes) if (key(node) === name) return node;
    return null;
  }
  function spoken(node) {
    const layer = layers[node.layer];
    const often = ["clean", "attacked"].filter((kind) => layer[kind])
      .map((kind) => `on ${percent(layer[kind][node.channel])} of ${kind} routes`);
    return [`${layer.name} channel ${node.channel}`, KINDS[node.kind], ...often].join(", ");
  }

  function neighbours(node, incoming) {
    const found = [];
    for (const edge of edges) {
      if ((incoming ? edge.target : edge.source) !== node.layer) continue;
      const values = state.influence && edge[state.influence];
      if (!values) continue;
      const mine = incoming ? values.targets : values.sources, others = incoming ? values.sources : values.targets;
      for (let i = 0; i < mine.length; i++) {
        if (mine[i] !== node.channel) continue;
        const other = { layer: incoming ? edge.source : edge.target, channel: others[i] };
        const target = incoming ? node : other;
        const arriving = layers[target.layer].arriving[state.influence][target.channel];
        found.push({ other, value: values.influence[i], share: arriving > 0 ? values.influence[i] / arriving : 0 });
      }
    }
    return found.sort((a, b) => b.share - a.share).slice(0, STRONGEST);
  }

  function pick(node) {  // what is under the pointer, has the focus, or was clicked
    const group = byId("picked-edges");
    group.replaceChildren();
    svg.classList.toggle("picking", Boolean(node));
    svg.querySelectorAll(".picked").forEach((item) => item.classList.remove("picked"));
    if (!node) { describe(null); return; }
    const incoming = neighbours(node, true), outgoing = neighbours(node, false);
    const me = find(key(node));
    if (me) {
      me.element.classList.add("picked");
      const most = Math.max(...[...incoming, ...outgoing].map((item) => item.share));
      for (const [list, into] of [[incoming, true], [outgoing, false]]) {
        for (const item of list) {
          const place = find(key(item.other));
          const other = place || { x: LEFT + item.other.layer * COLUMN, y: Number(svg.getAttribute("height")) - 8 };
          if (place) place.element.classList.add("picked");
          group.append(element("path", {
            class: `edge ${place ? "strong" : "strong off"} w${Math.max(1, Math.ceil((LEVELS * item.share) / most))}`,
            d: into ? curve(other, me) : curve(me, other),
          }));
        }
      }
    }
    describe(node, incoming, outgoing);
  }

  function describe(node, incoming, outgoing) {
    const panel = byId("channel");
    if (!node) {
      panel.replaceChildren(line("p", "Point at a channel, or move with the arrow keys; click or press Enter to keep it, Escape to let go."));
      return;
    }
    const layer = layers[node.layer], parts = [line("h3", `${layer.name}, channel ${node.channel}`)];
    for (const kind of ["clean", "attacked"]) {
      if (!layer[kind]) continue;
      const place = ranks[node.layer][kind].indexOf(node.channel) + 1, member = chosen(node.layer, kind).has(node.channel);
      parts.push(line("p", `${member ? "On" : "Not on"} the route of ${kind} samples: on ${percent(layer[kind][node.channel])} of their own routes, rank ${place} of ${layer.channels}.`));
    }
    if (!state.influence) parts.push(line("p", "Its influence was not measured."));
    else {
      parts.push(...listing("Strongest in", incoming, "of what arrives here"));
      parts.push(...listing("Strongest out", outgoing, "of what arrives there"));
    }
    panel.replaceChildren(...parts);
  }

  function listing(title, items, of) {
    if (!items.length) return [line("h4", title), line("p", "None is kept.")];
    const list = document.createElement("ol");
    for (const item of items) {
      const entry = document.createElement("li"), button = line("button", `${layers[item.other.layer].name} ${item.other.channel}`);
      button.type = "button";
      button.addEventListener("click", () => keep(item.other));
      entry.append(button, ` ${percent(item.share)} ${of}`);
      list.append(entry);
    }
    return [line("h4", title), list];
  }

  function keep(node) {
    state.channel = node && !same(node, state.channel) ? { layer: node.layer, channel: node.channel } : null;
    if (state.channel) focused = key(state.channel);
    render();
    writeHash();
  }

  function mark() {
    pick(state.channel);
    for (const button of document.querySelectorAll("#samples button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.sample) === state.sample));
    }
    if (state.channel) {
      const node = find(key(state.channel));
      if (node) node.element.setAttribute("aria-pressed", "true");
    }
  }

  function say() {
    const parts = [];
    if (has("clean") || has("attacked")) parts.push(`The route holds the most frequent ${percent(state.width, 0)} of each layer's channels.`);
    if (ranks.every((item) => item.clean && item.attacked)) {
      let both = 0, all = 0;
      layers.forEach((_, index) => {
        const clean = chosen(index, "clean"), attacked = chosen(index, "attacked");
        all += new Set([...clean, ...attacked]).size;
        both += [...clean].filter((channel) => attacked.has(channel)).length;
      });
      parts.push(`Clean and attacked samples share ${both} of ${all} channels on either route.`);
    }
    if (state.sample !== null) {
      const own = columns.reduce((sum, item) => sum + item.size, 0), agreed = columns.reduce((sum, item) => sum + item.agreed, 0);
      parts.push(`Of this sample's ${own} channels ${agreed} are on the model's route.`);
    }
    byId("route-says").textContent = parts.join(" ");
  }

  // --- what a reader does

  function nodeOf(event) {
    const group = event.target.closest && event.target.closest(".node");
    return group ? find(group.dataset.key) : null;
  }

  function prepareControls() {
    const link = (id, apply) => byId(id).addEventListener("input", (event) => { apply(event.target.value); schedule(); });
    link("width", (value) => { state.width = Number(value); });
    link("share", (value) => { state.share = Number(value); });
    link("rows", (value) => { state.rows = Number(value); });
    link("influence", (value) => { state.influence = value; });
    byId("width").disabled = !(has("clean") || has("attacked"));
    byId("share").disabled = !measured.length;
    byId("influence-label").hidden = measured.length < 2;
    svg.addEventListener("pointerover", (event) => { const node = nodeOf(event); if (node) pick(node); });
    svg.addEventListener("pointerleave", () => pick(state.channel));
    svg.addEventListener("click", (event) => { const node = nodeOf(event); if (node) keep(node); });
    svg.addEventListener("focusin", (event) => { const node = nodeOf(event); if (node) { focused = key(node); pick(node); } });
    svg.addEventListener("keydown", move);
    byId("search").addEventListener("input", (event) => search(event.target.value));
    const list = byId("samples");
    view.samples.forEach((sample, index) => {
      const entry = document.createElement("li"), button = line("button", title(sample));
      button.type = "button";
      button.dataset.sample = String(index);
      button.addEventListener("click", () => { state.sample = state.sample === index ? null : index; render(); writeHash(); });
      entry.append(button);
      list.append(entry);
    });
    byId("arcs").hidden = !edges.some((edge) => edge.target - edge.source > 1);
    byId("samples-part").hidden = !view.samples.length;
  }

  function title(sample) {
    const named = (label) => (label === null || label === undefined ? "?" : String(view.classes[label] || label));
    const guesses = ["clean", "attacked"].filter((kind) => kind in sample.predictions).map((kind) => sample.predictions[kind]);
    const wrong = guesses.filter((guess) => guess !== null && guess !== sample.label).map(named);
    return `${sample.index}: ${named(sample.label)}${wrong.length ? ` → ${[...new Set(wrong)].join(", ")}` : ""}`;
  }

  function move(event) {
    const node = nodeOf(event);
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") { keep(node); refocus(); }
    else if (event.key === "Escape") { state.channel = null; render(); writeHash(); refocus(); }
    else {
      const here = columns[node.layer].nodes, row = here.indexOf(node);
      const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
      if (!step) return;
      const next = columns[node.layer + step[0]];
      if (next && next.nodes.length) {
        const to = next.nodes[Math.min(next.nodes.length - 1, Math.max(0, row + step[1]))];
        node.element.setAttribute("tabindex", "-1");
        to.element.setAttribute("tabindex", "0");
        to.element.focus();
      }
    }
    event.preventDefault();
  }

  function refocus() { const node = find(focused); if (node) node.element.focus(); }

  function search(text) {
    const note = byId("found"), match = /^(.*?)[\s:#]*(\d+)$/.exec(text.trim());
    if (!text.trim()) { note.textContent = ""; return; }
    if (!match) { note.textContent = "Write a layer and a channel, as in conv1 12."; return; }
    // a layer's name may end in digits too: the whole text before the number must be part of it
    const channel = Number(match[2]), named = match[1].trim();
    const index = layers.findIndex((layer) => layer.name.endsWith(named) && channel < layer.channels);
    const loose = index >= 0 ? index : layers.findIndex((layer) => layer.name.includes(named) && channel < layer.channels);
    if (loose < 0) { note.textContent = "No such channel."; return; }
    note.textContent = `${layers[loose].name} ${channel}`;
    state.channel = { layer: loose, channel };
    focused = key(state.channel);
    render();
    writeHash();
    const node = find(focused);
    if (node) byId("route-scroll").scrollLeft = Math.max(0, node.x - 120);
  }

  // --- the address keeps the state, so that a view can be pointed at

  function readHash() {
    if (location.hash && !location.hash.includes("=")) { showControls(); return; }  // a link to a part of the page
    const read = new URLSearchParams(location.hash.slice(1));
    const number = (name, low, high) => {
      const value = Number(read.get(name));
      if (read.has(name) && value >= low && value <= high) state[name] = value;
    };
    number("width", 0.01, 1);
    number("share", 0.05, 1);
    number("rows", 5, 200);
    if (measured.includes(read.get("influence"))) state.influence = read.get("influence");
    const [layer, channel] = (read.get("channel") || ":").split(":").map((part) => (part === "" ? NaN : Number(part)));
    const known = Number.isInteger(channel) && layers[layer] && channel >= 0 && channel < layers[layer].channels;
    state.channel = known ? { layer, channel } : null;
    const sample = read.has("sample") ? Number(read.get("sample")) : NaN;
    state.sample = view.samples[sample] ? sample : null;
    showControls();
  }

  function showControls() {
    for (const name of ["width", "share", "rows"]) byId(name).value = String(state[name]);
    if (state.influence) byId("influence").value = state.influence;
    showValues();
  }

  function showValues() {
    byId("width-value").textContent = percent(state.width, 0);
    byId("share-value").textContent = percent(state.share, 0);
  }

  function writeHash() {
    showValues();
    const write = new URLSearchParams({ width: state.width, share: state.share, rows: state.rows });
    if (state.influence) write.set("influence", state.influence);
    if (state.channel) write.set("channel", key(state.channel));
    if (state.sample !== null) write.set("sample", state.sample);
    try { history.replaceState(null, "", `#${write}`); } catch { /* some viewers of mail forbid it */ }
  }
}
