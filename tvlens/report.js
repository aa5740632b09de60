// Draws the figures one after the other, the nearest to the view first, so that the page answers at once.
const wide = window.innerWidth >= 700; // On a phone the tool bar would lie over the figure.
const config = { responsive: true, displaylogo: false, displayModeBar: wide ? "hover" : false };
const waiting = new Set(document.querySelectorAll(".plot"));
const specs = new Map(); // as text: Plotly writes into what it is given
let printing = false;

// What stands for each colour on dark paper: tvlens.plots.palette.DARK.
const night = {
  "#ffffff": "#1d232a", "#1f2933": "#eef1f5", "#5f6b7a": "#a3adba", "#c5ccd6": "#4a5563",
  "#e6e9ee": "#333d48", "#eceff4": "#2a323c", "#8d98a6": "#b0bac6", "#0072b2": "#4a9fe0",
  "#e69f00": "#f5c04a", "#008a65": "#1fae84", "#8f3f72": "#b85c94", "#d55e00": "#ec7020",
  "#56b4e9": "#8ccdf7", "#8a5f00": "#ffdd8f",
};
const hex = (parts) => "#" + parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("");
const parts = (color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
const paper = parts(night["#ffffff"]);

// A figure is dark where the page's style says "--figures: dark".
const isDark = (box) => !printing && getComputedStyle(box).getPropertyValue("--figures").trim() === "dark";

// Exchanges a colour of the palette, also a faint one; others stay.
function shaded(color) {
  const found = /^rgba?\((\d+), (\d+), (\d+)(?:, ([\d.]+))?\)$/.exec(color);
  if (!found) return night[color] ?? color;
  const own = hex(found.slice(1, 4).map(Number));
  if (found[4] === undefined) return turned(own);
  return own in night ? `rgba(${parts(night[own]).join(", ")}, ${found[4]})` : color;
}

// Turns a colour of a scale round: what is white becomes the paper, what is dark becomes light, hues stay.
function turned(color) {
  const given = parts(color);
  const lift = 255 - Math.max(...given) - Math.min(...given);
  return hex(given.map((part, i) => paper[i] + ((part + lift) * (255 - paper[i])) / 255));
}

const styled = /(<(?:span|b|i) style="[^"]*color: ?)(#[0-9a-f]{6})/g;
const plain = new Set(["x", "y", "z", "customdata", "hovertemplate", "meta"]);

function darkened(value, key) {
  if (plain.has(key)) return value;
  if (key === "colorscale" && Array.isArray(value)) return value.map(([at, color]) => [at, turned(color)]);
  if (typeof value === "string") {
    if (/color(way)?$/.test(key)) return shaded(value);
    if (key === "shadow") return value.replace(/#[0-9a-f]{6}/g, shaded);
    return value.replace(styled, (_, before, color) => before + shaded(color));
  }
  if (Array.isArray(value)) return value.map((item) => darkened(item, key));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, darkened(item, name)]));
}

function draw(box) {
  waiting.delete(box);
  try {
    if (!specs.has(box)) specs.set(box, box.querySelector("script").textContent);
    const spec = JSON.parse(specs.get(box));
    const { data, layout } = isDark(box) ? darkened(spec, "") : spec;
    Plotly.react(box, data, layout, config);
    if (!wide) makeRoom(box, layout);
  } catch (error) {
    console.error(error);
    box.innerHTML = '<p class="failed">This figure could not be drawn.</p>';
  }
}

// A legend that wraps takes its lines from the plot: the figure grows by them.
function makeRoom(box, { height, margin }) {
  const lost = height - margin.t - (margin.b ?? 56) - box._fullLayout._size.h;
  if (lost > 8) Plotly.relayout(box, { height: height + lost });
}

function next() {
  const distance = (box) => {
    const place = box.getBoundingClientRect();
    return Math.max(place.top - window.innerHeight, -place.bottom, 0);
  };
  const nearest = [...waiting].sort((a, b) => distance(a) - distance(b))[0];
  if (nearest === undefined) return;
  draw(nearest);
  setTimeout(next);
}

// Figures follow the page: its scheme, a switch on it (as Furo has), and paper.
function redraw() {
  [...specs.keys()].forEach(draw);
}
function print(now) {
  printing = now;
  waiting.forEach(draw);
  redraw();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new MutationObserver(redraw).observe(document.body, { attributeFilter: ["data-theme"] });
window.addEventListener("beforeprint", () => print(true));
window.addEventListener("afterprint", () => print(false));
next();
