// Draws the figures one after the other, the nearest to the view first, so that the page answers at once.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const wide = window.innerWidth >= 700; // On a phone the tool bar would lie over the figure.
const waiting = new Set(document.querySelectorAll(".plot"));

function draw(box) {
  waiting.delete(box);
  try {
    const spec = JSON.parse(box.querySelector("script").textContent);
    Plotly.newPlot(box, spec.data, spec.layout, { ...config, displayModeBar: wide ? "hover" : false });
  } catch (error) {
    console.error(error);
    box.innerHTML = '<p class="failed">This figure could not be drawn.</p>';
  }
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

window.addEventListener("beforeprint", () => waiting.forEach(draw));
next();
