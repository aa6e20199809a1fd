// What a route view shows: which channels stand in a column, and which pairs of them are joined.

const STRONGEST = 5, PAIRS = 150, ROW = 15, LEFT = 54, HEAD = 46;

const Columns = {
  pair(v) { return v.setup.pairs[v.own.pair]; },
  sides(v) { const pair = Columns.pair(v); return { first: pair.first, second: pair.second }; },
  influence(v) { return Columns.sides(v)[v.own.side]; },  // number of the condition whose influence is drawn

  has(v, side) {
    const at = Columns.sides(v)[side];
    return at !== null && v.data.layers.some((layer) => layer.frequency[at] || layer.route[at]);
  },

  ranked(v, index, at, by) {  // channels by falling value
    const values = at === null ? null : v.data.layers[index][by][at], name = `${index} ${at} ${by}`;
    if (!values) return null;
    if (!v.ranks.has(name)) v.ranks.set(name, order(values));
    return v.ranks.get(name);
  },

  chosen(v, index, side) {  // the model's route at the slider's width
    const name = `${side} ${index}`;
    if (!v.sets.has(name)) v.sets.set(name, new Set(Columns.members(v, index, side)));
    return v.sets.get(name);
  },

  members(v, index, side) {
    const at = Columns.sides(v)[side];
    if (at === null) return [];
    const layer = v.data.layers[index], ranked = Columns.ranked(v, index, at, "frequency");
    return ranked ? ranked.slice(0, kept(v.shared.width, layer.channels)) : layer.route[at] || [];
  },

  kind(v, index, channel) {
    const first = Columns.chosen(v, index, "first").has(channel), second = Columns.chosen(v, index, "second").has(channel);
    return first ? (second ? "both" : "first") : second ? "second" : "own";
  },

  value(v, index, channel) {  // what the channels of a column are ordered by
    const layer = v.data.layers[index], sides = Columns.sides(v);
    const known = [sides.first, sides.second].map((at) => (at === null ? null : layer[v.shared.order][at]));
    return Math.max(0, ...known.map((values) => (values ? values[channel] : 0)));
  },

  make(v, index, column) {
    const own = Columns.sampleRoute(v, index), kind = (channel) => Columns.kind(v, index, channel);
    const values = new Map(), value = (channel) => {
      if (!values.has(channel)) values.set(channel, Columns.value(v, index, channel));
      return values.get(channel);
    };
    const route = [...new Set([...Columns.chosen(v, index, "first"), ...Columns.chosen(v, index, "second")])]
      .sort((a, b) => value(b) - value(a) || a - b);
    const shown = route.slice(0, v.shared.rows);
    const others = own ? [...own].filter((channel) => kind(channel) === "own") : [];
    const list = [...shown, ...others.slice(0, Math.ceil(v.shared.rows / 2))];
    const pinned = v.shared.channel && v.shared.channel.layer === index ? v.shared.channel.channel : null;
    if (pinned !== null && !list.includes(pinned)) list.push(pinned);
    return {
      nodes: list.map((channel, row) => ({
        layer: index, channel, kind: kind(channel), onSample: own !== null && own.has(channel),
        x: LEFT + index * column, y: row * ROW,
      })),
      hidden: route.length - shown.length,
      agreed: own ? [...own].filter((channel) => kind(channel) !== "own").length : 0,
      size: own ? own.size : 0,
    };
  },

  sampleRoute(v, index) {
    if (v.shared.sample === null) return null;
    const routes = v.data.samples[v.shared.sample].routes, sides = Columns.sides(v);
    const found = [Columns.influence(v), sides.first, sides.second].find((at) => at !== null && at !== undefined && routes[at]);
    return found === undefined ? null : new Set(routes[found][index]);
  },

  pairs(v, edge, wanted) {  // strongest first, up to the share of what is between the shown channels
    const at = Columns.influence(v), values = at === null || at === undefined ? null : edge.influence[at];
    if (!values) return [];
    const place = (index) => new Map(v.columns[index].nodes.filter(wanted).map((node) => [node.channel, node]));
    const from = place(edge.source), to = place(edge.target), found = [];
    let total = 0;
    for (let i = 0; i < values.influence.length; i++) {
      const a = from.get(values.sources[i]), b = to.get(values.targets[i]);
      if (a && b) { found.push([a, b, values.influence[i]]); total += values.influence[i]; }
    }
    let sum = 0;
    const cut = found.findIndex((pair) => (sum += pair[2]) >= v.shared.share * total);
    return found.slice(0, Math.min(PAIRS, cut < 0 ? found.length : cut + 1));
  },

  neighbours(v, node, incoming) {  // a channel's strongest edges, by their share of what arrives at their end
    const at = Columns.influence(v), found = [];
    for (const edge of v.data.edges) {
      if ((incoming ? edge.target : edge.source) !== node.layer) continue;
      const values = at === null || at === undefined ? null : edge.influence[at];
      if (!values) continue;
      const mine = incoming ? values.targets : values.sources, others = incoming ? values.sources : values.targets;
      for (let i = 0; i < mine.length; i++) {
        if (mine[i] !== node.channel) continue;
        const other = { layer: incoming ? edge.source : edge.target, channel: others[i] };
        const target = incoming ? node : other;
        const arriving = v.data.layers[target.layer].arriving[at][target.channel];
        found.push({ other, value: values.influence[i], share: arriving > 0 ? values.influence[i] / arriving : 0 });
      }
    }
    return found.sort((a, b) => b.share - a.share).slice(0, STRONGEST);
  },
};
