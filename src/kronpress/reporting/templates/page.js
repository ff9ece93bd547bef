"use strict";
const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const phone = matchMedia("(max-width: 40rem)");

// ---- theme ----

const THEME = "kronpress-theme";
const remembered = (() => { try { return localStorage.getItem(THEME); } catch { return null; } })();
function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  try { localStorage.setItem(THEME, theme); } catch { /* a file opened from disk may not remember */ }
  charts.forEach((chart) => chart.draw());
}
const charts = [];
all('input[name="theme"]').forEach((input) => {
  input.checked = input.value === (remembered || "auto");
  input.addEventListener("change", () => setTheme(input.value));
});
if (remembered && remembered !== "auto") root.dataset.theme = remembered;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.draw()));

// ---- one of several has the focus, and arrow keys move it ----

function roving(items, step, show) {
  items.forEach((item, index) => {
    item.tabIndex = index === 0 ? 0 : -1;
    // Not mouseenter: what scrolls under a resting pointer is not pointed at.
    item.addEventListener("mousemove", () => show(item));
    item.addEventListener("focus", () => {
      items.forEach((other) => { other.tabIndex = other === item ? 0 : -1; });
      show(item);
    });
    item.addEventListener("click", () => item.focus());
    item.addEventListener("keydown", (event) => {
      const next = step(item, event.key);
      if (next) { event.preventDefault(); next.focus(); }
    });
  });
}

// ---- map ----

all("table.grid").forEach((table) => {
  const rows = all("tbody tr", table).map((row) => all("td", row));
  const figures = table.closest(".map").querySelector(".figures");
  const cells = all("td[data-figures]", table);
  const place = (cell) => {
    const row = rows.findIndex((each) => each.includes(cell));
    return [row, rows[row].indexOf(cell)];
  };
  const along = (cell, down, right) => {
    let [row, column] = place(cell);
    for (;;) {
      row += down; column += right;
      const next = rows[row]?.[column];
      if (!next || next.dataset.figures) return next;
    }
  };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  roving(
    cells,
    (cell, key) => moves[key] ? along(cell, ...moves[key]) : { Home: cells[0], End: cells.at(-1) }[key],
    (cell) => { figures.textContent = cell.dataset.figures; },
  );
});

// ---- tokens ----

all(".passage").forEach((passage) => {
  const tokens = all(".tokens span", passage);
  const scale = JSON.parse(passage.querySelector("script").textContent);
  const figures = passage.querySelector(".figures p");
  function colour() {
    const chosen = passage.querySelector("input:checked").value;
    const isDifference = chosen.includes("-");
    const [first, second] = chosen.split("-").map(Number);
    all(".scale", passage).forEach((each) => { each.hidden = each.dataset.of !== (isDifference ? "difference" : "loss"); });
    tokens.forEach((token, index) => {
      const of = (model) => scale.nats[model][index];
      const known = of(first) !== null && (!isDifference || of(second) !== null);
      const value = known ? (isDifference ? (of(first) - of(second)) / scale.difference : of(first) / scale.loss) : 0;
      token.style.setProperty("--up", Math.round(100 * Math.max(0, Math.min(1, value))));
      token.style.setProperty("--down", Math.round(100 * Math.max(0, Math.min(1, -value))));
    });
  }
  const show = (token) => {
    const index = tokens.indexOf(token);
    const read = scale.models.map((name, model) => `${name} ${scale.nats[model][index]?.toFixed(2) ?? "–"}`);
    figures.textContent = `${JSON.stringify(token.textContent)}, nats: ${read.join("; ")}`;
  };
  const neighbour = (token, key) => {
    const index = tokens.indexOf(token);
    return { ArrowLeft: tokens[index - 1], ArrowRight: tokens[index + 1], Home: tokens[0], End: tokens.at(-1) }[key];
  };
  roving(tokens, neighbour, show);
  all("input", passage).forEach((input) => input.addEventListener("change", colour));
  colour();
});

// ---- tables that sort ----

all("table.sorts").forEach((table) => {
  all("thead th", table).forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("thead th", table).forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      const order = (a, b) => {
        // What is not known comes last either way.
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const [x, y] = [Number(key(a)), Number(key(b))];
        const sign = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
        return down ? -sign : sign;
      };
      table.tBodies[0].append(...all("tr", table.tBodies[0]).sort(order));
    });
  });
});

// ---- copying ----

all("button.copy").forEach((button) => {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.of).textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(document.getElementById(button.dataset.of)); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
});

// ---- charts ----

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star", "triangle-down", "hexagon", "pentagon"];
const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);
function resolved(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.keys = figure.querySelector(".keys");
    this.said = figure.querySelector(".said");
    this.hidden = new Set();
    const { controls, views } = JSON.parse(figure.querySelector("script").textContent);
    Object.assign(this, { controls, views });
    this.inputs = all("select", figure.querySelector(".controls") ?? document.createElement("i"));
    this.inputs.forEach((input) => input.addEventListener("change", () => this.draw()));
    this.plot.textContent = "";
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.plot.addEventListener("blur", () => Plotly.Fx.unhover(this.plot));
  }

  get view() { return this.views[this.inputs.map((input) => input.value).join("|")]; }
  get shown() { return this.view.series.filter((series) => !this.hidden.has(series.name)); }

  draw() {
    const { view } = this;
    const [fore, soft, line, back] = ["--fore", "--soft", "--line", "--back"].map(resolved);
    const traces = this.shown.map((series) => {
      const colour = resolved(`--series-${series.colour % 8}`);
      const symbol = SYMBOLS[series.colour % 8];
      const names = series.x.map((_, i) => series.filled.length && !series.filled[i] ? `${symbol}-open` : symbol);
      return {
        type: "scatter", name: series.name, x: series.x, y: series.y, text: series.texts, hoverinfo: "text",
        mode: series.is_line ? "lines" : series.with_line ? "lines+markers" : "markers",
        ...(series.low.length ? { error_y: bars(series, colour) } : {}),
        line: { color: colour, width: 2, dash: series.is_dashed ? "dot" : "solid" },
        marker: { color: colour, symbol: names, size: view.x_categories.length > 40 ? 7 : 10, line: { width: 2, color: colour } },
      };
    });
    // What spans little has no round numbers on a logarithmic axis.
    const spans = view.y_is_log && ratio(view.series.flatMap((series) => series.y)) > 2;
    const axis = (title, isLog) => ({
      title: { text: title, standoff: 8 }, type: isLog ? "log" : "linear", gridcolor: line, zerolinecolor: line,
      linecolor: line, tickcolor: line, automargin: true, fixedrange: phone.matches, ...(isLog ? logTicks(view, title) : {}),
    });
    const x = axis(view.x_title, view.x_is_log);
    if (view.x_categories.length) Object.assign(x, { tickmode: "array", ...someTicks(view.x_categories) });
    Plotly.react(this.plot, traces, {
      paper_bgcolor: back, plot_bgcolor: back, showlegend: false, hovermode: "closest", dragmode: phone.matches ? false : "zoom",
      font: { color: fore, family: "system-ui, sans-serif", size: phone.matches ? 12 : 13 },
      hoverlabel: { bgcolor: back, bordercolor: soft, font: { color: fore }, align: "left" },
      margin: { l: 56, r: 18, t: 14, b: 46 },
      xaxis: x, yaxis: { ...axis(view.y_title, spans), ...(view.y_range ? { range: view.y_range } : {}) },
    }, { displayModeBar: false, responsive: true });
    this.drawKeys();
  }

  drawKeys() {
    const glyphs = ["●", "■", "◆", "▲", "★", "▼", "⬢", "⬟"];
    this.keys.replaceChildren(...this.view.series.map((series) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const glyph = document.createElement("span");
      glyph.textContent = `${series.is_line ? "━" : glyphs[series.colour % 8]} `;
      glyph.style.color = `var(--series-${series.colour % 8})`;
      glyph.setAttribute("aria-hidden", "true");
      button.type = "button";
      button.append(glyph, series.name);
      button.setAttribute("aria-pressed", String(!this.hidden.has(series.name)));
      button.addEventListener("click", () => {
        if (!this.hidden.delete(series.name)) this.hidden.add(series.name);
        this.draw();
        all("button", this.keys)[this.view.series.indexOf(series)].focus();
      });
      item.append(button);
      return item;
    }));
    this.at = null;
  }

  move(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") { Plotly.Fx.unhover(this.plot); this.said.textContent = ""; return; }
    if (!moves[event.key] || !this.shown.length) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    let [curve, point] = this.at ?? [0, 0];
    if (this.at) {
      curve = (curve + down + this.shown.length) % this.shown.length;
      point += right;
    }
    point = Math.max(0, Math.min(point, this.shown[curve].x.length - 1));
    this.at = [curve, point];
    Plotly.Fx.hover(this.plot, [{ curveNumber: curve, pointNumber: point }]);
    this.said.textContent = this.shown[curve].texts[point];
  }
}

function bars(series, color) {
  const length = (end, index) => (end[index] === null ? 0 : Math.abs(end[index] - series.y[index]));
  return {
    type: "data", symmetric: false, color, thickness: 1.5, width: 5,
    array: series.y.map((_, index) => length(series.high, index)),
    arrayminus: series.y.map((_, index) => length(series.low, index)),
  };
}

const ratio = (values) => Math.max(...values) / Math.min(...values);

// Ticks of a logarithmic axis that are read as plain numbers, about five of them.
function logTicks(view, title) {
  const values = view.series.flatMap((series) => (title === view.x_title ? series.x : series.y)).filter((value) => value > 0);
  if (!values.length) return {};
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const lead of high / low > 50 ? [1, 3] : high / low > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8]) ticks.push(lead * 10 ** power);
  }
  const kept = ticks.filter((tick) => tick >= low / 1.6 && tick <= high * 1.6);
  return { tickmode: "array", tickvals: kept, ticktext: kept.map((tick) => String(Number(tick.toPrecision(3)))) };
}

function someTicks(names) {
  const every = Math.ceil(names.length / (phone.matches ? 6 : 14));
  const kept = names.map((_, index) => index).filter((index) => index % every === 0);
  const short = (name) => { const parts = name.split("."); return parts.length > 3 ? parts.slice(-3).join(".") : name; };
  return { tickvals: kept.map((index) => index + 1), ticktext: kept.map((index) => short(names[index])), tickangle: -40 };
}

async function library() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

(async () => {
  const figures = all("figure.chart");
  if (figures.length) {
    await library();
    for (const figure of figures) {
      const chart = new Chart(figure);
      charts.push(chart);
      chart.draw();
    }
    let theme;
    addEventListener("beforeprint", () => {
      theme = root.dataset.theme;
      root.dataset.theme = "light";
      charts.forEach((chart) => chart.draw());
    });
    addEventListener("afterprint", () => {
      if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
      charts.forEach((chart) => chart.draw());
    });
  }
  root.dataset.ready = "true";
})();
