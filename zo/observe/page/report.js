"use strict";
// Steps or time below the curves; a choice outlives the page's next version.
const body = document.body, kept = "zo-by";
function choose(by) {
  body.dataset.by = by;
  try { sessionStorage.setItem(kept, by); } catch { /* not in this browser */ }
}
let by = "step";
try { by = sessionStorage.getItem(kept) || by; } catch { /* not in this browser */ }
choose(by);
for (const nav of document.querySelectorAll("nav")) {
  nav.hidden = false;
  nav.addEventListener("click", (event) => event.target.dataset.by && choose(event.target.dataset.by));
}

// The values of the point nearest to the pointer, in the legend.
function show(value) {
  const size = Math.abs(value);
  if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  return String(+value.toPrecision(4));
}
for (const svg of document.querySelectorAll("svg")) {
  const [low, high, start, stop] = svg.dataset.x.split(" ").map(Number);
  const [bottom, top, from, to, isLog] = svg.dataset.y.split(" ").map(Number);
  const outputs = svg.closest("figure").querySelectorAll("output"), rule = svg.querySelector(".rule");
  let series;
  const read = () => [...svg.querySelectorAll("[data-of]")].map((path) => [
    outputs[path.dataset.of],
    path.getAttribute("d").slice(1).replace(/h0/g, "").split(/[LM]/).map((p) => p.split(" ").map(Number)),
  ]);
  svg.addEventListener("pointermove", (event) => {
    series = series || read();
    if (!series.length) return;
    const at = (event.clientX - svg.getBoundingClientRect().x) * svg.viewBox.baseVal.width / svg.clientWidth;
    const near = (points) => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const x = near(series[series.length - 1][1])[0];
    for (const [output, points] of series) {
      const y = bottom + (near(points)[1] - from) / (to - from) * (top - bottom);
      output.value = show(isLog ? 10 ** y : y);
    }
    rule.setAttribute("d", `M${x} ${to}V${from}`);
    rule.nextSibling.textContent = show(low + (x - start) / (stop - start) * (high - low));
    rule.nextSibling.setAttribute("x", x);
  });
  svg.addEventListener("pointerleave", () => {
    rule.removeAttribute("d");
    rule.nextSibling.textContent = "";
    for (const output of outputs) output.value = output.dataset.last;
  });
}

// A run that goes on writes a new page; one that is silent may have been killed.
if (body.dataset.live) {
  const silent = (Date.now() - Date.parse(body.dataset.live)) / 60000, news = document.getElementById("news");
  if (silent > 2) {
    news.textContent = `· silent for ${Math.round(silent)} minutes`;
    news.hidden = false;
  }
  setTimeout(() => location.reload(), 10000);
}
