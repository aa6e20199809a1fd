// The route views of the page, the state that they share, and the page's address, which keeps it.

const views = [];
let scheduled = false;

function openViews(data) {
  const states = new Map();  // views of one data set move together
  for (const [number, setup] of data.route_views.entries()) {
    const root = document.querySelector(`.route-view[data-view="${number}"]`), view = data.route_data[0];
    if (!states.has(setup.data)) states.set(setup.data, { width: view.width, rows: 20, share: 0.3, order: "frequency", channel: null, sample: null });
    const v = {
      root, setup, data: view, shared: states.get(setup.data), own: { pair: setup.control === "eps" ? setup.pairs.length - 1 : 0, side: "first" },
      part: (name) => root.querySelector(`[data-part="${name}"]`), svg: root.querySelector("svg.drawing"),
      sets: new Map(), ranks: new Map(), columns: [], groups: null, column: 118, height: 0, focused: null,
    };
    views.push(v);
    Controls.prepare(v);
  }
  if (!views.length) return;
  readHash();
  renderAll();
  addEventListener("hashchange", () => { readHash(); renderAll(); });
  addEventListener("resize", schedule);
}

function renderAll() {
  for (const v of views) { Controls.show(v); Drawing.render(v); }
}

function schedule() {
  if (scheduled) return;
  scheduled = true;
  setTimeout(() => { scheduled = false; renderAll(); writeHash(); }, 16);  // one drawing for many moves of the slider
}

function readHash() {
  if (location.hash && !location.hash.includes("=")) return;  // a link to a part of the page
  const [v] = views, read = new URLSearchParams(location.hash.slice(1));
  const number = (home, name, low, high) => {
    const value = Number(read.get(name));
    if (read.has(name) && value >= low && value <= high) home[name] = value;
  };
  number(v.shared, "width", 0.01, 1);
  number(v.shared, "share", 0.05, 1);
  number(v.shared, "rows", 5, 200);
  if (["frequency", "gradient", "sensitivity"].includes(read.get("order"))) v.shared.order = read.get("order");
  const pair = read.has("pair") ? Number(read.get("pair")) : NaN;
  if (v.setup.pairs[pair]) v.own.pair = pair;
  if (["first", "second"].includes(read.get("influence"))) v.own.side = read.get("influence");
  Controls.offer(v);
  const [layer, channel] = (read.get("channel") || ":").split(":").map((part) => (part === "" ? NaN : Number(part)));
  const known = Number.isInteger(channel) && v.data.layers[layer] && channel >= 0 && channel < v.data.layers[layer].channels;
  v.shared.channel = known ? { layer, channel } : null;
  const sample = read.has("sample") ? Number(read.get("sample")) : NaN;
  v.shared.sample = v.data.samples[sample] ? sample : null;
}

function writeHash() {
  const [v] = views, { width, share, rows, order: by, channel, sample } = v.shared;
  const write = new URLSearchParams({ width, share, rows, order: by, pair: v.own.pair, influence: v.own.side });
  if (channel) write.set("channel", Drawing.key(channel));
  if (sample !== null) write.set("sample", sample);
  try { history.replaceState(null, "", `#${write}`); } catch { /* some viewers of mail forbid it */ }
}
