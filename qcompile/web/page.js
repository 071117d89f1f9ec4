"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const operators = new Map(data.report.operators.map((op) => [op.name, op]));
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const charts = [];

  function chart(id, make) {
    const canvas = document.getElementById(id);
    if (canvas) charts.push(() => { Chart.getChart(canvas)?.destroy(); new Chart(canvas, make()); });
  }

  function drawAll() {
    Chart.defaults.color = colour("ink");
    Chart.defaults.borderColor = colour("line");
    Chart.defaults.maintainAspectRatio = false;
    Chart.defaults.animation = false;
    Chart.defaults.plugins.legend.display = false;
    charts.forEach((draw) => draw());
  }

  // The graph, and what is said of one operator.
  const graph = document.querySelector("svg.graph");
  for (const input of document.querySelectorAll("input[name=colour]"))
    input.addEventListener("change", () => graph.setAttribute("class", `graph ${input.value}`));

  function choose(name, scroll) {
    const op = operators.get(name);
    const facts = [`${op.op_type} '${op.name}': ${op.kernel ?? { integer: "integers", weight_only: "weights only", float: "float" }[op.precision]}`];
    if (op.sqnr !== null) facts.push(`${op.sqnr} dB against float`);
    if (op.weight_bits !== null) facts.push(`weights in ${op.weight_bits} bits`);
    if (op.reason) facts.push(op.reason);
    document.getElementById("operator").textContent = facts.join("; ");
    graph.querySelector(".chosen")?.classList.remove("chosen");
    const box = [...graph.querySelectorAll(".op")].find((each) => each.dataset.op === name);
    box.classList.add("chosen");
    if (scroll) {
      const view = document.getElementById("graph"), at = box.getBoundingClientRect(), frame = view.getBoundingClientRect();
      view.scrollBy(at.left - frame.left - frame.width / 2 + at.width / 2, at.top - frame.top - frame.height / 2);
    }
    const tensor = op.reads.find((each) => each in data.distributions);
    if (tensor) show(tensor);
  }
  for (const box of graph.querySelectorAll(".op")) {
    box.addEventListener("click", () => choose(box.dataset.op, false));
    box.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(box.dataset.op, false); });
  }
  const view = document.getElementById("graph");
  view.scrollLeft = (view.scrollWidth - view.clientWidth) / 2;

  // Layers.
  const layers = data.report.operators.filter((op) => op.sqnr !== null);
  chart("layers", () => ({
    type: "bar",
    data: {
      labels: layers.map((op) => op.name),
      datasets: [{
        data: layers.map((op) => op.sqnr), categoryPercentage: 1, barPercentage: 0.9,
        backgroundColor: layers.map((op) => colour(op.precision)),
      }],
    },
    options: {
      scales: { x: { ticks: { display: false }, grid: { display: false } }, y: { title: { display: true, text: "dB" } } },
      onClick: (_, [hit]) => { if (hit) choose(layers[hit.index].name, true); },
    },
  }));

  // Distributions: those of which most is outside of the range first.
  const tensors = Object.keys(data.distributions).sort((a, b) => (data.distributions[b].outside ?? 0) - (data.distributions[a].outside ?? 0));
  const select = document.getElementById("tensor");
  const logarithmic = document.getElementById("logarithmic");
  for (const name of tensors) select.add(new Option(`${data.distributions[name].role} ${name}`, name));
  if (!tensors.length) document.getElementById("tensors").hidden = true;

  const clipping = {
    id: "clipping",
    afterDatasetsDraw(drawn) {
      const range = data.distributions[select.value]?.range;
      if (!range) return;
      const { ctx, chartArea: area, scales: { x } } = drawn;
      ctx.save();
      ctx.fillStyle = colour("bad-colour");
      for (const [end, from, to] of [[range[0], area.left, 0], [range[1], 0, area.right]]) {
        const at = Math.min(Math.max(x.getPixelForValue(end), area.left), area.right);
        ctx.globalAlpha = 1;
        ctx.fillRect(at - 1, area.top, 2, area.height);
        ctx.globalAlpha = 0.12;
        if (from) ctx.fillRect(from, area.top, at - from, area.height); else ctx.fillRect(at, area.top, to - at, area.height);
      }
      ctx.restore();
    },
  };
  chart("distribution", () => {
    const one = data.distributions[select.value];
    const points = one.counts.map((count, index) => ({ x: one.low + (index + 0.5) * one.width, y: count }));
    return {
      type: "bar",
      data: { datasets: [{ data: points, backgroundColor: colour(one.role === "weight" ? "weight_only" : "integer"), categoryPercentage: 1, barPercentage: 0.95, grouped: false }] },
      options: {
        scales: {
          x: { type: "linear", min: one.low, max: one.low + one.counts.length * one.width, title: { display: true, text: one.unit } },
          y: { type: logarithmic.checked ? "logarithmic" : "linear", min: logarithmic.checked ? 0.5 : 0, title: { display: true, text: "values" } },
        },
        parsing: true,
      },
      plugins: [clipping],
    };
  });
  function show(name) {
    if (name) select.value = name;
    const one = data.distributions[select.value];
    const share = one.outside === null ? "" : ` ${(100 * one.outside).toPrecision(2)} % of the values are outside of what they reach.`;
    document.getElementById("outside").textContent = `${one.dtype} codes.${share}`;
    drawAll();
  }
  select.addEventListener("change", () => show());
  logarithmic.addEventListener("change", drawAll);

  // The front.
  if (data.front) {
    const at = (row) => ({ x: row.size, y: row.sqnr });
    const known = (rows) => rows.filter((row) => row.sqnr !== null).map(at);
    chart("front", () => ({
      type: "scatter",
      data: {
        datasets: [
          { label: "front", data: known(data.front.points), showLine: true, borderColor: colour("integer"), backgroundColor: colour("integer"), order: 3 },
          { label: "all alike", data: known(Object.values(data.front.uniform)), backgroundColor: colour("float"), pointRadius: 8, order: 2 },
          { label: "chosen", data: known([data.front.chosen]), backgroundColor: colour("bad-colour"), pointRadius: 6, order: 1 },
        ],
      },
      options: {
        plugins: { legend: { display: true } },
        scales: { x: { title: { display: true, text: "size over float's" } }, y: { title: { display: true, text: "expected dB" } } },
      },
    }));
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  if (tensors.length) show(); else drawAll();
})();
