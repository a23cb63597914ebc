const data = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "circle", "text", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function pills(values, choose) {
  const row = element("div", { class: "pills" });
  const buttons = values.map((value) => element("button", { type: "button", "aria-pressed": "false" }, value));
  buttons.forEach((button, i) => button.addEventListener("click", () => pick(i)));
  const pick = (i) => {
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
    choose(values[i]);
  };
  row.append(...buttons);
  pick(0);
  return row;
}

function swatch(line) {
  const svg = element("svg", { width: 30, height: 12, viewBox: "0 0 30 12", "aria-hidden": "true" });
  svg.append(element("line", { x1: 1, x2: 29, y1: 6, y2: 6, stroke: line.colour, "stroke-width": line.width, "stroke-dasharray": line.dashes }));
  if (line.points) svg.append(element("circle", { cx: 15, cy: 6, r: 3.4, fill: line.colour }));
  return svg;
}

function chart(board, place) {
  const size = { width: 1032, height: 400, left: 44, right: 16, top: 14, bottom: 44 };
  const counts = [...new Set(board.series.flatMap((line) => line.points.map((point) => Math.round(point.tokens))))].sort((a, b) => a - b);
  const low = Math.log(counts[0]), high = Math.log(Math.max(counts.at(-1), counts[0] + 1));
  const x = (tokens) => size.left + 20 + ((Math.log(tokens) - low) / (high - low)) * (size.width - size.left - size.right - 40);
  const holder = element("div", { class: "chart" }), tip = element("div", { class: "tip" });
  const levels = board.levels.map((level) => ({ ...level, colour: "#1f2937", width: 1.4 }));

  function show(kind) {
    const values = [...board.series.flatMap((line) => line.points), ...levels].map((point) => point.accuracy[kind]);
    const floor = Math.max(0, Math.floor((Math.min(...values) - 0.03) * 10) / 10), ceiling = Math.min(1, Math.ceil((Math.max(...values) + 0.02) * 10) / 10);
    const y = (value) => size.top + ((ceiling - value) / (ceiling - floor)) * (size.height - size.top - size.bottom);
    const svg = element("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": `accuracy by kept tokens, ${kind}` });
    for (let value = floor; value < ceiling + 0.01; value += 0.1) {
      svg.append(element("line", { x1: size.left, x2: size.width - size.right, y1: y(value), y2: y(value), stroke: "#e5e7eb" }));
      svg.append(element("text", { x: size.left - 10, y: y(value) + 4, "text-anchor": "end" }, String(Math.round(100 * value))));
    }
    for (const count of counts) svg.append(element("text", { x: x(count), y: size.height - size.bottom + 20, "text-anchor": "middle" }, String(count)));
    svg.append(element("text", { x: (size.left + size.width) / 2, y: size.height - 6, "text-anchor": "middle" }, board.axis));
    for (const level of levels) {
      const height = y(level.accuracy[kind]);
      svg.append(element("line", { x1: size.left, x2: size.width - size.right, y1: height, y2: height, stroke: level.colour, "stroke-width": level.width, "stroke-dasharray": level.dashes }));
      const text = `${level.name} ${(100 * level.accuracy[kind]).toFixed(1)} %`;
      svg.append(element("text", { x: size.left + 4, y: height - 6 }, text));
    }
    for (const line of [...board.series].reverse()) svg.append(curve(line, kind, y));
    holder.replaceChildren(svg, tip);
  }

  function curve(line, kind, y) {
    const group = element("g", { class: "series", "data-name": line.name });
    const path = line.points.map((point, i) => `${i ? "L" : "M"}${x(point.tokens)} ${y(point.accuracy[kind])}`).join("");
    group.append(element("path", { d: path, fill: "none", stroke: line.colour, "stroke-width": line.width, "stroke-dasharray": line.dashes, "stroke-linejoin": "round" }));
    for (const point of line.points) {
      const at = { cx: x(point.tokens), cy: y(point.accuracy[kind]) };
      const target = element("circle", { ...at, r: 13, fill: "transparent" });
      target.addEventListener("mouseenter", () => {
        tip.textContent = `${line.name}: ${(100 * point.accuracy[kind]).toFixed(1)} % with ${Math.round(point.tokens)} tokens`;
        tip.style.cssText = `display:block;left:${(100 * at.cx) / size.width}%;top:${(100 * at.cy) / size.height}%`;
        focus(line.name);
      });
      target.addEventListener("mouseleave", () => { tip.style.display = "none"; focus(null); });
      group.append(element("circle", { ...at, r: 4, fill: line.colour, stroke: "#fff", "stroke-width": 1.2 }), target);
    }
    return group;
  }

  function focus(name) {
    for (const node of place.querySelectorAll("[data-name]")) node.classList.toggle("dim", name !== null && node.dataset.name !== name);
  }

  const legend = element("div", { class: "legend" });
  for (const line of board.series) {
    const entry = element("span", { "data-name": line.name }, swatch(line), line.name);
    entry.addEventListener("mouseenter", () => focus(line.name));
    entry.addEventListener("mouseleave", () => focus(null));
    legend.append(entry);
  }
  for (const level of levels) legend.append(element("span", {}, swatch(level), level.name));
  place.append(pills(["all questions", ...board.kinds], show), holder, legend);
}

function gallery(board, place) {
  const table = element("table", { class: "gallery" }), body = element("tbody");
  const slider = element("input", { type: "range", min: 0, max: board.keeps.length - 1, value: board.reference, step: 1, "aria-label": "kept tokens" });
  const amount = element("b"), label = element("label", {}, element("span", {}, "kept tokens of every picture"), amount);
  const image = (picture, name) => element("img", { loading: "lazy", src: picture.url, alt: `${name}, ${picture.tokens} tokens`, width: board.side });

  function answer(picture) {
    return element("span", { class: picture.right ? "right" : "wrong" }, `${picture.right ? "✓" : "✗"} ${picture.answer || "no answer"}`);
  }

  function row(name, pictures, ...more) {
    const cells = pictures.map((picture, i) => element("td", {}, ...(picture ? [image(picture, name), ...more.map((text) => text(i)), answer(picture)] : [])));
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  }

  function show() {
    const keep = board.keeps[Number(slider.value)];
    amount.textContent = keep;
    const of = (method) => board.exhibits.map((exhibit) => exhibit.kept.find((kept) => kept.method === method && kept.keep === keep));
    const rows = board.methods.map((method) => [method, of(method)]).filter(([, pictures]) => pictures.some(Boolean));
    body.replaceChildren(...rows.map(([method, pictures]) => row(method, pictures)));
  }

  const question = (i) => element("em", {}, board.exhibits[i].question);
  table.append(element("thead", {}, row(`all ${board.exhibits[0].original.tokens} tokens`, board.exhibits.map((exhibit) => exhibit.original), question)), body);
  slider.addEventListener("input", show);
  place.append(element("div", { class: "slide" }, label, slider), element("div", { class: "scroll" }, table));
  show();
}

data.forEach((board, i) => {
  if (board.series.length) chart(board, document.getElementById(`chart-${i}`));
  if (board.exhibits.length && board.keeps.length) gallery(board, document.getElementById(`gallery-${i}`));
});
