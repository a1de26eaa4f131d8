// Draws every .plot with Plotly, in the colours of the page around it, when it first has a width: tabs hide some.
(() => {
  "use strict";

  // Named one by one, so that none that asks a network is among them.
  const tools = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = {displaylogo: false, responsive: false, modeBarButtons: tools};

  function inked(value, ink) {
    if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, own]) => [key, key === "color" && own === "black" ? ink : inked(own, ink)]));
  }

  function themed(layout, ink) {
    const faint = "rgba(128, 128, 128, 0.25)";
    const lines = {gridcolor: faint, zerolinecolor: faint, linecolor: faint};
    const axis = (own) => ({...lines, ...own, tickfont: {size: 12}, title: {font: {size: 12}, ...own.title}});
    return {
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      ...layout,
      font: {family: "system-ui, sans-serif", size: 13, color: ink},
      modebar: {bgcolor: "rgba(0, 0, 0, 0)", color: "rgba(128, 128, 128, 0.7)", activecolor: ink},
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
    };
  }

  function draw(plot) {
    const ink = getComputedStyle(plot).color;
    const {data, layout} = JSON.parse(plot.dataset.plot);
    const traces = data.map((trace) => inked(trace, ink));
    Plotly.react(plot, traces, {...themed(layout, ink), width: plot.clientWidth, height: plot.clientHeight}, config);
    plot.dataset.width = plot.clientWidth;
  }

  const plots = [...document.querySelectorAll(".plot")];
  const seen = new ResizeObserver((entries) => {
    for (const {target} of entries) {
      if (target.clientWidth > 0 && Number(target.dataset.width) !== target.clientWidth) draw(target);
    }
  });
  plots.forEach((plot) => seen.observe(plot));

  const redraw = () => plots.filter((plot) => plot.clientWidth > 0 && plot.dataset.width).forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new MutationObserver(redraw).observe(document.documentElement, {attributes: true});
})();
