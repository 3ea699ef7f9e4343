"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const palette = ["#4269d0", "#ef8e18", "#e0524b", "#3aa99b", "#3ca951", "#e0609f", "#9a5be8", "#5aa5e8", "#9c6b4e", "#8d939c"];
  const labels = data.labels.filter(label => data.points.some(p => p.label === label));
  // Numbers of evaluations that several solvers share; all of them where none is shared.
  const every = data.points.map(p => p.nfe).sort((a, b) => a - b);
  const shared = every.filter((n, i) => n === every[i - 1] && n !== every[i - 2]);
  const budgets = shared.length ? shared : [...new Set(every)];
  const hidden = new Set();
  const metrics = data.metrics;
  const state = { metric: metrics[0], split: data.about[metrics[0]]?.splits[0] };
  const about = () => data.about[state.metric] ?? { splits: [], higher: false };
  const colour = label => palette[labels.indexOf(label) % palette.length];
  const dash = label => labels.indexOf(label) >= palette.length ? "6 4" : null;
  const strong = label => label === "auto";
  const byId = id => document.getElementById(id);
  const shown = () => data.points.filter(p => !hidden.has(p.label));
  const distance = p => p.metrics[state.metric]?.[state.split];

  const format = v => v == null ? "–" : v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(1)
    : String(Number(v.toPrecision(3)));
  // Two digits of the error, and the value to the same decimal.
  function withError(d) {
    if (!d) return "–";
    const error = 2 * d.se, decimals = error > 0 ? Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(error)))) : 3;
    return `${d.value.toFixed(decimals)} ± ${error.toFixed(decimals)}`.replace("-", "−");
  }
  const time = s => s >= 1 ? `${format(s)} s` : s >= 1e-3 ? `${format(s * 1e3)} ms` : `${format(s * 1e6)} µs`;

  function element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  function draw(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
    if (text != null) node.textContent = text;
    parent.append(node);
    return node;
  }

  // Marks that differ in shape as well as in colour.
  const shapes = [
    (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
    (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    (x, y, r) => `M${x},${y - 1.3 * r}l${1.2 * r},${2.2 * r}h${-2.4 * r}z`,
    (x, y, r) => `M${x},${y - 1.4 * r}l${1.4 * r},${1.4 * r}l${-1.4 * r},${1.4 * r}l${-1.4 * r},${-1.4 * r}z`,
    (x, y, r) => `M${x},${y + 1.3 * r}l${1.2 * r},${-2.2 * r}h${-2.4 * r}z`,
  ];
  const shape = label => shapes[labels.indexOf(label) % shapes.length];

  // 1-2-5 ticks on a logarithmic axis, thinned to what fits.
  function ticks(low, high, most) {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const s of steps) { const v = s * 10 ** e; if (v >= low * .999 && v <= high * 1.001) found.push(v); }
      if (found.length <= most || steps.length === 1) return found;
    }
  }

  // 1-2-5 ticks on a linear axis.
  function evenTicks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(m => m * power).find(v => v >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  // Ticks at least `gap` pixels apart.
  function spaced(values, position, gap) {
    const kept = [];
    for (const v of values) if (!kept.length || position(v) - position(kept.at(-1)) >= gap) kept.push(v);
    return kept;
  }

  function chart(id, { x, y, error, xLabel, xFormat, xTicks, converged, linear }) {
    const host = byId(id);
    if (!host) return;
    const width = Math.max(280, host.clientWidth), height = Math.round(Math.min(360, Math.max(250, width * .62)));
    const left = 48, right = 12, top = 10, bottom = 40;
    host.textContent = "";
    const svg = draw(host, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": host.parentNode.firstElementChild.textContent });
    const points = shown().filter(p => y(p) != null && x(p) > 0);
    if (!points.length) { draw(svg, "text", { x: width / 2, y: height / 2, class: "empty" }, "nothing to show"); return; }

    const xs = points.map(x), positive = points.map(y).filter(v => v > 0);
    const level = converged?.();
    if (level?.value > 0) positive.push(level.value);
    const floor = positive.length ? Math.min(...positive) / 1.6 : 1e-3;
    const range = { x0: Math.min(...xs) / 1.15, x1: Math.max(...xs) * 1.15, y0: floor, y1: Math.max(...positive, 2 * floor) * 1.3 };
    if (linear) {
      const ends = points.flatMap(p => [y(p) - 2 * (error?.(p) ?? 0), y(p) + 2 * (error?.(p) ?? 0)]);
      if (level) ends.push(level.value);
      const low = Math.min(...ends), high = Math.max(...ends), margin = .06 * (high - low) || .5;
      range.y0 = low - margin;
      range.y1 = high + margin;
    }
    const px = v => left + (width - left - right) * Math.log(v / range.x0) / Math.log(range.x1 / range.x0);
    const share = v => linear ? (v - range.y0) / (range.y1 - range.y0) : Math.log(Math.max(v, range.y0) / range.y0) / Math.log(range.y1 / range.y0);
    const py = v => top + (height - top - bottom) * (1 - share(v));

    for (const v of (linear ? evenTicks : ticks)(range.y0, range.y1, 8)) {
      draw(svg, "line", { x1: left, x2: width - right, y1: py(v), y2: py(v), class: "grid" });
      draw(svg, "text", { x: left - 7, y: py(v) + 4, "text-anchor": "end" }, format(v));
    }
    for (const v of spaced(xTicks ?? ticks(range.x0, range.x1, width / 55), px, 28)) {
      draw(svg, "line", { x1: px(v), x2: px(v), y1: top, y2: height - bottom, class: "grid" });
      draw(svg, "text", { x: px(v), y: height - bottom + 16, "text-anchor": "middle" }, xFormat(v));
    }
    draw(svg, "path", { d: `M${left},${top}V${height - bottom}H${width - right}`, fill: "none", class: "axis" });
    draw(svg, "text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel);

    if (level) {
      const high = py(level.value + 2 * level.se), low = py(Math.max(level.value - 2 * level.se, range.y0));
      draw(svg, "rect", { x: left, width: width - left - right, y: high, height: Math.max(1, low - high), class: "band" });
      draw(svg, "line", { x1: left, x2: width - right, y1: py(level.value), y2: py(level.value), class: "converged" });
    }
    const marks = [];
    const order = [...labels].sort((a, b) => strong(a) - strong(b));
    for (const label of order) {
      const own = points.filter(p => p.label === label).sort((a, b) => a.nfe - b.nfe);
      if (!own.length) continue;
      const group = draw(svg, "g", { "data-label": label, stroke: colour(label), fill: colour(label) });
      draw(group, "path", {
        d: own.map((p, i) => `${i ? "L" : "M"}${px(x(p)).toFixed(1)},${py(y(p)).toFixed(1)}`).join(""),
        fill: "none", "stroke-width": strong(label) ? 3 : 1.6, "stroke-dasharray": dash(label), "stroke-linejoin": "round",
      });
      for (const p of own) {
        const cx = px(x(p)), cy = py(y(p)), e = error?.(p);
        if (e != null) draw(group, "path", { d: `M${cx},${py(y(p) + 2 * e)}V${py(y(p) - 2 * e)}`, class: "error", "stroke-width": 1.4 });
        const below = !linear && y(p) <= 0;  // bias-corrected distances can be: drawn hollow on the axis
        draw(group, "path", { d: shape(label)(cx, cy, strong(label) ? 4.6 : 3.6), class: "mark", fill: below ? "var(--panel)" : null });
        marks.push({ cx, cy, p });
      }
    }
    if (level) draw(svg, "text", { x: width - right - 4, y: py(level.value + 2 * level.se) - 5, "text-anchor": "end", class: "halo" }, "the model itself, converged");
    const ring = draw(svg, "circle", { r: 8, fill: "none", stroke: "var(--text)", "stroke-width": 1.5, visibility: "hidden" });
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), scale = width / box.width;
      const mx = (event.clientX - box.left) * scale, my = (event.clientY - box.top) * scale;
      const near = marks.reduce((a, b) => Math.hypot(b.cx - mx, b.cy - my) < Math.hypot(a.cx - mx, a.cy - my) ? b : a);
      if (Math.hypot(near.cx - mx, near.cy - my) > 40) { hide(); ring.setAttribute("visibility", "hidden"); return; }
      ring.setAttribute("visibility", "visible");
      ring.setAttribute("cx", near.cx);
      ring.setAttribute("cy", near.cy);
      tell(near.p, box.left + near.cx / scale, box.top + near.cy / scale);
    });
    svg.addEventListener("pointerleave", () => { hide(); ring.setAttribute("visibility", "hidden"); });
  }

  const tooltip = byId("tooltip");
  function tell(p, left, top) {
    const lines = [`${format(p.nfe)} evaluations, ${time(p.seconds_per_sample)} a sample`];
    for (const split of about().splits) lines.push(`${split}: ${withError(p.metrics[state.metric][split])}`);
    if (p.rmse != null) lines.push(`RMSE ${format(p.rmse)}, median ${format(p.rmse_median)}`);
    tooltip.replaceChildren(element("b", {}, p.label), ...lines.map(line => element("div", {}, line)));
    tooltip.hidden = false;
    const box = tooltip.getBoundingClientRect();
    tooltip.style.left = `${Math.max(4, Math.min(left + 14, innerWidth - box.width - 4))}px`;
    tooltip.style.top = `${top + box.height + 20 > innerHeight ? top - box.height - 12 : top + 14}px`;
  }
  function hide() { tooltip.hidden = true; }

  function charts() {
    const d = key => p => distance(p)?.[key];
    const level = () => data.reference?.metrics[state.metric]?.[state.split];
    const linear = about().higher;
    byId("direction").textContent = linear ? "Higher" : "Lower";
    const perNfe = { xLabel: "network evaluations per sample", x: p => p.nfe, xFormat: format, xTicks: budgets };
    chart("chart-nfe", { ...perNfe, y: d("value"), error: d("se"), converged: level, linear });
    chart("chart-seconds", { x: p => p.seconds_per_sample, y: d("value"), error: d("se"), xLabel: "time per sample", xFormat: time, converged: level, linear });
    chart("chart-rmse", { ...perNfe, y: p => p.rmse });
    chart("chart-median", { ...perNfe, y: p => p.rmse_median });
  }

  function choice(id, values, key) {
    byId(id).replaceChildren();
    if (values.length < 2) return;
    for (const value of values) {
      const button = element("button", { type: "button", "aria-pressed": value === state[key] }, value);
      button.addEventListener("click", () => {
        state[key] = value;
        for (const other of byId(id).children) other.setAttribute("aria-pressed", other === button);
        if (key === "metric") splitChoice();
        charts();
        samples();
      });
      byId(id).append(button);
    }
  }

  function splitChoice() {
    if (!about().splits.includes(state.split)) state.split = about().splits[0];
    choice("split-choice", about().splits, "split");
  }

  function legend() {
    for (const label of labels) {
      const button = element("button", { type: "button", "aria-pressed": true });
      const svg = draw(button, "svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
      draw(svg, "path", { d: "M0,5H22", stroke: colour(label), "stroke-width": strong(label) ? 3 : 1.6, "stroke-dasharray": dash(label) });
      draw(svg, "path", { d: shape(label)(11, 5, 3.4), fill: colour(label) });
      button.append(label);
      button.addEventListener("click", () => {
        if (!hidden.delete(label)) hidden.add(label);
        button.setAttribute("aria-pressed", !hidden.has(label));
        charts();
        samples();
      });
      byId("legend").append(button);
    }
  }

  const slider = byId("budget");
  slider.max = Math.max(0, budgets.length - 1);
  slider.value = Math.max(0, budgets.findIndex(b => b >= 8));
  function strip(images, name) {
    const small = data.shape[1] <= 32 ? "small" : "";
    return element("div", { class: "strip" }, ...images.map((png, i) =>
      element("img", { src: `data:image/png;base64,${png}`, class: small, alt: `sample ${i} of ${name}` })));
  }
  function samples() {
    const budget = budgets[slider.value];
    byId("budget-value").textContent = format(budget);
    const rows = [];
    const facts = p => element("div", { class: "facts" }, element("span", {}, `${format(p.nfe)} evaluations `),
      ...(distance(p) ? [element("span", {}, `${state.metric} ${withError(distance(p))}`)] : []));
    if (data.reference?.images.length)
      rows.push(element("div", { class: "row" }, element("div", {},
        element("div", { class: "name" }, `converged (${data.reference.label})`), facts(data.reference)),
        strip(data.reference.images, "the converged solution")));
    for (const label of labels) {
      const own = shown().filter(p => p.label === label && p.nfe <= budget && p.images.length);
      if (!own.length) continue;
      const p = own.reduce((a, b) => b.nfe > a.nfe ? b : a);
      rows.push(element("div", { class: "row", "data-label": label }, element("div", {},
        element("div", { class: "name" }, element("i", { style: `background:${colour(label)}` }), label),
        facts(p)), strip(p.images, label)));
    }
    byId("samples").replaceChildren(...rows);
  }
  slider.addEventListener("input", samples);

  function table() {
    const columns = [["solver", p => p.label, p => p.label], ["steps", p => p.steps], ["NFE", p => p.nfe, p => format(p.nfe)]];
    if (data.points.some(p => p.rows_per_sample !== p.nfe)) columns.push(["rows", p => p.rows_per_sample, p => format(p.rows_per_sample)]);
    for (const metric of metrics) for (const split of data.about[metric].splits)
      columns.push([`${metric}, ${split}`, p => p.metrics[metric][split]?.value, p => {
        const d = p.metrics[metric][split];
        return d?.place ? [element("span", { class: `badge ${d.place}` }, d.place), withError(d)] : [withError(d)];
      }]);
    columns.push(["RMSE", p => p.rmse, p => format(p.rmse)], ["median", p => p.rmse_median, p => format(p.rmse_median)],
      ["time", p => p.seconds_per_sample, p => time(p.seconds_per_sample)]);
    if (data.points.some(p => p.joules_per_sample != null))
      columns.push(["energy", p => p.joules_per_sample, p => p.joules_per_sample == null ? "–" : `${format(p.joules_per_sample)} J`]);
    if (data.points.some(p => p.memorisation)) columns.push(
      ["memorisation", p => p.memorisation?.ratio, p => format(p.memorisation?.ratio)],
      ["copies", p => p.memorisation?.copies, p => p.memorisation ? `${format(100 * p.memorisation.copies)}%` : "–"]);

    let sorted = 2, ascending = true;
    const body = element("tbody");
    const cells = p => columns.map(([, value, text]) => element("td", {}, ...[(text ?? value)(p)].flat()));
    const headers = columns.map(([name], i) => {
      const button = element("button", { type: "button" }, name);
      button.addEventListener("click", () => {
        ascending = sorted === i ? !ascending : true;
        sorted = i;
        fill();
      });
      return element("th", { scope: "col" }, button);
    });
    function fill() {
      const value = columns[sorted][1], sign = ascending ? 1 : -1;
      const rows = [...data.points].sort((a, b) => {
        const [u, v] = [value(a), value(b)];
        if (u == null || v == null) return (u == null) - (v == null);
        return sign * (typeof u === "string" ? u.localeCompare(v) : u - v);
      });
      headers.forEach((h, i) => i === sorted ? h.setAttribute("aria-sort", ascending ? "ascending" : "descending") : h.removeAttribute("aria-sort"));
      body.replaceChildren(...rows.map(p => element("tr", {}, ...cells(p))));
      if (data.reference) {
        const row = element("tr", { class: "reference" }, ...cells(data.reference));
        row.firstChild.textContent = `converged (${data.reference.label})`;
        body.append(row);
      }
    }
    byId("table").append(element("thead", {}, element("tr", {}, ...headers)), body);
    fill();
  }

  choice("metric-choice", metrics, "metric");
  splitChoice();
  legend();
  charts();
  samples();
  table();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; charts(); } });
})();
