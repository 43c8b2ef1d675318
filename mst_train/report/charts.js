"use strict";
// Values under the pointer, ranges of steps and logarithmic axes for the charts of the page.
// A chart's drawing stays as it is until it is zoomed or made logarithmic: then its curves,
// which stand in the drawing's data-chart (charts.py writes them), are drawn in its place.

function ticks(low, high, count, least = 0) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * [1, 2, 5, 10].find((one) => one * power >= rough));
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e++)
    for (const one of high > 1e3 * low ? [1] : [1, 2, 5]) found.push(one * 10 ** e);
  const inside = found.filter((value) => low <= value && value <= high);
  return inside.length < 3 ? ticks(low, high, 5) : inside;
}

function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(value) >= size) return +(value / size).toPrecision(6) + unit;
  return String(+value.toPrecision(6));
}

// The least and the greatest of values, and a little more.
function around(values, log, zero) {
  const seen = values.filter((value) => value > 0 || !log).map((v) => (log ? Math.log(v) : v));
  if (!seen.length) return [1, 10];
  let low = Infinity, high = -Infinity;
  for (const value of seen) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const more = 0.05 * (high - low) || (log ? 0.05 : 0.05 * Math.abs(high) || 1);
  if (log) return [Math.exp(low - more), Math.exp(high + more)];
  return [zero ? 0 : low - more, high + more];
}

// The place of the value in ascending xs that is nearest to x.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
}

const charts = [];
let range = null; // of steps (or tokens), the same in all charts; null: the whole

function chart(svg) {
  const about = JSON.parse(svg.dataset.chart);
  const [, top, right, bottom] = about.box;
  const figure = svg.closest("figure");
  const drawing = svg.querySelector("[id^=axes]");
  const own = add(svg, "g"), mark = add(svg, "g");
  const tip = figure.appendChild(document.createElement("div"));
  const button = figure.appendChild(document.createElement("button"));
  let left = about.box[0], log = false, xs = about.x, ys = about.y, from = null;

  function add(parent, name, attributes = {}) {
    const made = parent.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  }
  function write(x, y, anchor, text) {
    const style = { x, y, "text-anchor": anchor, "font-size": 10, fill: "var(--faint)" };
    add(own, "text", style).textContent = text;
  }
  function across(x) {
    return left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - left);
  }
  function up(y) {
    const [value, low, high] = [y, ...ys].map((one) => (log ? Math.log(one) : one));
    return bottom - ((value - low) / (high - low)) * (bottom - top);
  }
  function pointed(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    return Math.min(Math.max(x, left), right);
  }
  function valueAt(x) {
    return xs[0] + ((x - left) / (right - left)) * (xs[1] - xs[0]);
  }

  function draw() {
    const zoomed = range && !about.ticks;
    own.replaceChildren();
    clear();
    drawing.style.display = zoomed || log ? "none" : "";
    [left, xs, ys] = [about.box[0], zoomed ? range : about.x, about.y];
    if (!zoomed && !log) return;
    const seen = about.curves.flatMap(({ x, y }) =>
      y.filter((_, n) => xs[0] <= x[n] && x[n] <= xs[1]));
    ys = around(seen.length ? seen : about.curves.flatMap(({ y }) => y), log, about.zero);
    const heights = log ? logTicks(...ys) : ticks(...ys, 5);
    left = Math.max(left, ...heights.map((y) => 8 + 6 * short(y).length));
    for (const y of heights) {
      const height = up(y);
      add(own, "path", { d: `M${left} ${height}H${right}`, stroke: "var(--grid)" });
      write(left - 4, height + 3.5, "end", short(y));
    }
    const words = about.ticks?.map((word, n) => [n, word]);
    for (const [x, word] of words || ticks(...xs, 7, 1).map((x) => [x, short(x)]))
      write(across(x), bottom + 12, "middle", word);
    write((left + right) / 2, bottom + 26, "middle", about.label);
    const [width, height] = [right - left, bottom - top];
    const inside = { x: left, y: top, width, height };
    const viewBox = `${left} ${top} ${width} ${height}`; // what leaves it is cut off
    const lines = add(own, "svg", { ...inside, viewBox, fill: "none" });
    for (const curve of about.curves) {
      if (curve.style !== "rings") {
        const bold = { opacity: curve.medians ? 0.35 : 1, width: curve.medians ? 0.8 : 1.7 };
        line(lines, curve, curve.y, bold);
      }
      if (curve.medians) line(lines, curve, curve.medians, { opacity: 1, width: 1.7 });
      if (["rings", "points"].includes(curve.style))
        curve.y.forEach((y, n) => {
          const fill = curve.style === "rings" ? "none" : curve.color;
          if (y > 0 || !log) dot(lines, curve.x[n], y, 2.2, curve.color, fill);
        });
    }
  }
  function line(parent, curve, values, { opacity, width }) {
    let path = "", joined = false;
    values.forEach((y, n) => {
      const there = y > 0 || !log;
      if (there) path += `${joined ? "L" : "M"}${across(curve.x[n])} ${up(y)}`;
      joined = there;
    });
    add(parent, "path", { d: path, stroke: curve.color, "stroke-width": width, opacity });
  }
  function dot(parent, x, y, r, stroke, fill) {
    add(parent, "circle", { cx: across(x), cy: up(y), r, stroke, fill });
  }

  function clear() {
    mark.replaceChildren();
    tip.hidden = true;
  }
  function show(x) {
    clear();
    if (from !== null) {
      const [start, width] = [Math.min(from, x), Math.abs(x - from)];
      const area = { x: start, y: top, width, height: bottom - top };
      add(mark, "rect", { ...area, fill: "var(--ink)", opacity: 0.12 });
    }
    const near = about.curves
      .map((curve) => ({ curve, n: nearest(curve.x, valueAt(x)) }))
      .map(({ curve, n }) => ({ curve, n, x: curve.x[n], away: Math.abs(across(curve.x[n]) - x) }))
      .filter(({ x }) => xs[0] <= x && x <= xs[1]);
    if (!near.length) return;
    const best = near.reduce((one, other) => (other.away < one.away ? other : one));
    const at = across(best.x);
    add(mark, "path", { d: `M${at} ${top}V${bottom}`, stroke: "var(--faint)" });
    const digits = (y) => y.toLocaleString("en", { maximumSignificantDigits: 6 });
    const name = (x) => (about.ticks ? about.ticks[x] : x.toLocaleString("en"));
    const rows = [[`${about.label} ${name(best.x)}`]];
    for (const { curve, n, x, away } of near) {
      if (away > best.away + 12) continue;
      let text = `${curve.name} ${digits(curve.y[n])}`;
      if (curve.medians) text += `, median ${digits(curve.medians[n])}`;
      if (x !== best.x) text += ` (at ${name(x)})`;
      rows.push([text, curve.color]);
      if (curve.y[n] > 0 || !log) dot(mark, x, curve.y[n], 2.6, "var(--panel)", curve.color);
    }
    tip.replaceChildren(...rows.map(([text, color]) => {
      const row = document.createElement("div");
      row.className = "run";
      if (color) {
        const swatch = row.appendChild(document.createElement("i"));
        swatch.className = "dot";
        swatch.style.background = color;
      }
      row.append(text.trim());
      return row;
    }));
    tip.hidden = false;
    const [outer, inner] = [figure, svg].map((one) => one.getBoundingClientRect());
    const place = inner.left - outer.left + (at / svg.viewBox.baseVal.width) * inner.width;
    const onRight = place < outer.width / 2;
    tip.style.left = onRight ? `${place + 10}px` : "auto";
    tip.style.right = onRight ? "auto" : `${outer.width - place + 10}px`;
    tip.style.top = `${inner.bottom - outer.top}px`; // below: it hides no curve
  }

  tip.className = "tip";
  clear();
  button.type = "button";
  button.textContent = "log";
  button.title = "Logarithmic axis";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    log = !log;
    button.setAttribute("aria-pressed", String(log));
    draw();
  });
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    if (!about.ticks) from = pointed(event);
    svg.setPointerCapture(event.pointerId);
    show(pointed(event));
  });
  svg.addEventListener("pointermove", (event) => show(pointed(event)));
  svg.addEventListener("pointerup", (event) => {
    const ends = [from, pointed(event)].sort((a, b) => a - b).map(valueAt);
    const dragged = from !== null && Math.abs(pointed(event) - from) > 5;
    from = null;
    if (!dragged) return show(pointed(event));
    range = ends;
    for (const one of charts) one.draw();
  });
  svg.addEventListener("pointercancel", () => {
    from = null;
    clear();
  });
  svg.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && clear());
  svg.addEventListener("dblclick", () => {
    range = null;
    for (const one of charts) one.draw();
  });
  return { draw };
}

if (typeof document !== "undefined") {
  for (const svg of document.querySelectorAll("svg[data-chart]")) charts.push(chart(svg));
  for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
}
