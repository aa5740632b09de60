// The closed forms of tvlens.icl.theory, computed anew whenever a slider moves. All losses in nats.
function logOverN(value) {
  // Solves log(n) / n = value for the n above e, by bisection on t = log(n): t - log(t) = -log(value).
  if (value >= Math.exp(-1)) return 1;
  const target = -Math.log(value);
  let low = 1, high = 2 * target + 2;
  for (let i = 0; i < 64; i++) {
    const middle = (low + high) / 2;
    if (middle - Math.log(middle) < target) low = middle;
    else high = middle;
  }
  return Math.exp(high);
}

function inContext({ length, n_irrelevant, n_classes, epsilon, b, label_noise }) {
  const weight = Math.exp(2 * Math.sqrt(b)), most = 1 - epsilon * n_classes, rest = length - n_irrelevant;
  const high = (wrong) => -Math.log((most * (length - wrong)) / length + epsilon);
  const low = (wrong) => wrong === length ? high(wrong)
    : (most * wrong) / (wrong + (length - wrong) * weight) + epsilon * (n_classes - 1);
  const ends = { low: 0, high: 0 };
  // The query's label is right or shifted; a relevant item bears the same one with probability `match`.
  for (const match of [1 - label_noise, label_noise]) {
    let ways = 1;
    for (let right = 0; right <= rest; right++) {
      const chance = match * ways * match ** right * (1 - match) ** (rest - right);
      ends.low += chance * low(length - right);
      ends.high += chance * high(length - right);
      ways *= (rest - right) / (right + 1);
    }
  }
  return ends;
}

function closedForms(setting, n) {
  const rho = setting.label_noise, half = (setting.n_classes - 1) / 2;
  const term = (p) => (p > 0 ? -p * Math.log(p) : 0);
  const risk = term(rho) + term(1 - rho), ends = inContext(setting);
  const crossover = (loss) => loss > risk ? Math.max(logOverN((loss - risk) / half), 1) : Infinity;
  return {
    risk, in_context_low: ends.low, in_context_high: ends.high,
    crossover_low: crossover(ends.low), crossover_high: crossover(ends.high),
    in_weight: n.map((x) => risk + (half * Math.log(x)) / x), in_weight_next: n.map((x) => risk + half / x),
  };
}

function explore(box, spec) {
  const plot = box.querySelector(".plot"), sliders = [...box.querySelectorAll("input")];
  const short = (x) => x === Infinity ? "never" : x >= 100 ? Math.round(x).toLocaleString("en")
    : String(Number(x.toPrecision(3)));
  function update() {
    const setting = {};
    for (const slider of sliders) {
      if (slider.name === "n_irrelevant") slider.max = setting.length;
      const value = Number(slider.value);
      setting[slider.name] = slider.name === "epsilon" ? 10 ** value : value;
      slider.parentElement.querySelector("output").textContent = short(setting[slider.name]);
    }
    const found = closedForms(setting, spec.n), last = [spec.n[0], spec.n[spec.n.length - 1]];
    for (const cell of box.querySelectorAll("[data-name]")) {
      cell.dataset.value = found[cell.dataset.name];
      cell.textContent = short(found[cell.dataset.name]);
    }
    const flat = (y) => ({ x: last, y: [y, y] });
    const meet = [found.crossover_low, found.crossover_high];
    const lines = {
      in_context_low: flat(found.in_context_low), in_context_high: flat(found.in_context_high),
      risk: flat(found.risk), in_weight: { x: spec.n, y: found.in_weight },
      in_weight_next: { x: spec.n, y: found.in_weight_next },
      crossover: { x: meet.map((x) => (x === Infinity ? null : x)), y: [found.in_context_low, found.in_context_high] },
    };
    spec.traces.forEach((name, i) => Object.assign(spec.figure.data[i], lines[name]));
    spec.figure.layout.yaxis.range = [0, 1.15 * Math.max(found.in_context_high, found.risk) + 0.3];
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    if (window.Plotly) Plotly.react(plot, spec.figure.data, spec.figure.layout, config);
  }
  function start(tries) {
    if (window.Plotly || tries === 0) box.querySelector(".failed").hidden = Boolean(window.Plotly);
    if (window.Plotly) update();
    else if (tries > 0) setTimeout(() => start(tries - 1), 100);
  }
  if (!window.Plotly && spec.cdn && !document.querySelector(`script[src="${spec.cdn}"]`)) {
    document.head.appendChild(Object.assign(document.createElement("script"), { src: spec.cdn }));
  }
  sliders.forEach((slider) => slider.addEventListener("input", update));
  update();
  start(150);
}
