"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const body = document.querySelector("tbody");
const rows = [...body.rows];
const SVG = "http://www.w3.org/2000/svg";
const KINDS = {
  opening: ["O", "opens"], reply: ["R", "replies"], speech: ["S", "speaks on"],
  backchannel: ["B", "backchannel"], pause_taken: ["P", "takes a pause"],
  interruption: ["X", "interrupts the user"],
  user_interruption: ["Y", "is interrupted by the user"],
  user_backchannel: ["H", "hears a backchannel"], no_reply: ["N", "does not reply"],
};
const PAPER = 860;  // of a picture in print, so that its words can be read
const MARKED = ["backchannel", "pause_taken", "interruption", "user_interruption", "no_reply"];

function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "rect", "line", "text", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function clock(s) {
  const m = Math.floor(s / 60);
  return `${m}:${(s - 60 * m).toFixed(1).padStart(4, "0")}`;
}
function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}
function wavePath(packed, width, middle, height) {
  const v = bytes(packed), step = width / v.length;
  let path = `M0 ${middle}`, back = "";
  for (let i = 0; i < v.length; i++) {
    const x = (i * step).toFixed(1), h = (v[i] / 255) * height;
    path += `L${x} ${(middle - h).toFixed(1)}`;
    back = `L${x} ${(middle + h).toFixed(1)}` + back;
  }
  return path + `L${width} ${middle}` + back + "Z";
}

const scaled = document.querySelector("thead [data-scale]");
const common = scaled ? +scaled.dataset.scale : 0;

// The small picture in the table: both sides' speech as bars, of so many seconds.
function strip(cell, r, seconds) {
  if (!r.d) return;
  const w = 170, svg = make("svg", { viewBox: `0 0 ${w} 22`, preserveAspectRatio: "none",
    width: "100%", height: 22, role: "img", "aria-label": "user above, agent below" });
  const k = w / (seconds || r.d);
  for (const y of [6, 16]) svg.append(make("line", { x1: 0, x2: (r.d * k).toFixed(1), y1: y, y2: y, class: "grid" }));
  for (const [segments, y, name] of [[r.us, 2, "user"], [r.gs, 12, "agent"]])
    for (const [a, b] of segments)
      svg.append(make("rect", { x: (a * k).toFixed(1), y, height: 8, class: name,
        width: Math.max(1, (b - a) * k).toFixed(1) }));
  cell.append(svg);
}

// Places words side by side in as few lanes as three; the rest become ticks.
function words(svg, r, k, top) {
  const free = [0, 0, 0];
  for (const [text, start, end] of r.w) {
    const x = start * k, width = text.length * 6.4 + 6;
    const lane = free.findIndex((until) => until <= x);
    const tip = make("title", {}, `${text}  ${clock(start)} to ${clock(end)}`);
    if (lane < 0) {
      svg.append(make("rect", { x, y: top + 38, width: 2, height: 4, class: "tick" }, tip));
    } else {
      free[lane] = x + width;
      svg.append(make("text", { x, y: top + 11 + 13 * lane }, tip, text));
    }
  }
}

function picture(r, k) {
  const width = Math.ceil(r.d * k) + 2, height = 206;
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": describe(r) });
  const every = [0.5, 1, 2, 5, 10, 30, 60, 120, 300].find((s) => s * k >= 80) || 600;
  for (let t = 0; t <= r.d; t += every) {
    const unit = t ? "" : every < 1 ? " s" : " min:s";
    svg.append(make("line", { x1: t * k, x2: t * k, y1: 20, y2: 190, class: "grid" }));
    const anchor = t * k > width - 20 ? "end" : t ? "middle" : "start";
    svg.append(make("text", { x: t * k, y: 202, class: "axis", "text-anchor": anchor },
      unit && every < 1 ? "0 s" : (every < 1 ? clock(t) : clock(t).slice(0, -2)) + unit));
  }
  for (const [segments, y, name] of [[r.us, 22, "userband"], [r.gs, 84, "agentband"]])
    for (const [a, b] of segments)
      svg.append(make("rect", { x: a * k, y, width: (b - a) * k, height: 58, class: name }));
  for (const [kind, a, b, text, value] of r.ev) {
    const [letter, what] = KINDS[kind] || ["?", kind];
    const tip = `agent ${what}, ${clock(a)} to ${clock(b)}` +
      (value === null ? "" : `, ${kind === "reply" ? "after" : "stops in"} ${value} s`) +
      (text ? `: ${text}` : "");
    if (kind === "reply" && value > 0) {
      const g = make("g", {}, make("title", {}, tip),
        make("line", { x1: (a - value) * k, x2: a * k, y1: 81, y2: 81, class: "gap" }));
      if (value * k > 18) g.append(make("text", { x: (a - value / 2) * k, y: 79,
        class: "axis", "text-anchor": "middle" }, value.toFixed(2) + (value * k > 34 ? " s" : "")));
      svg.append(g);
    }
    if (!MARKED.includes(kind)) continue;
    const g = make("g", {}, make("title", {}, tip));
    if (kind !== "no_reply") g.append(make("rect", { x: a * k, y: 18,
      width: Math.max(2, (b - a) * k), height: 124, class: "over" }));
    g.append(make("line", { x1: a * k, x2: a * k, y1: 4, y2: 142, class: "mark" }),
      make("text", { x: a * k + 4, y: 13, class: "marktext" }, letter));
    svg.append(g);
  }
  for (const [packed, middle, name] of [[r.u, 51, "user"], [r.g, 113, "agent"]])
    if (packed) svg.append(make("path", { d: wavePath(packed, width, middle, 27), class: name }));
  svg.append(make("text", { x: 4, y: 34, class: "user" }, r.u ? "user, up to 0 dBFS" : "user: not in this file"),
    make("text", { x: 4, y: 96, class: "agent" }, "agent, up to 0 dBFS"));
  words(svg, r, k, 144);
  return svg;
}

function describe(r) {
  const counts = {};
  for (const [kind] of r.ev) counts[kind] = (counts[kind] || 0) + 1;
  const said = Object.entries(counts).map(([k, n]) => `${n} ${k.replace("_", " ")}`);
  return `${r.n}, ${r.d.toFixed(1)} seconds: ${said.join(", ") || "no events"}`;
}

function latency(r) {
  const width = 720, height = 130, top = Math.max(100, ...r.lat) * 1.05;
  const y = (ms) => 8 + (height - 30) * (1 - ms / top);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img",
    style: "max-width:900px", "aria-label": `step latency, at most ${Math.max(...r.lat)} ms` });
  const points = r.lat.map((ms, i) =>
    `${i ? "L" : "M"}${(40 + (i * (width - 44)) / Math.max(1, r.lat.length - 1)).toFixed(1)} ${y(ms).toFixed(1)}`);
  svg.append(make("line", { x1: 40, x2: width, y1: y(0), y2: y(0), class: "grid" }),
    make("path", { d: points.join(""), class: "steps" }),
    make("line", { x1: 40, x2: width, y1: y(80), y2: y(80), class: "limit" }),
    make("text", { x: 2, y: y(80) + 4, class: "limittext" }, "80 ms"),
    make("text", { x: 14, y: y(0) + 4, class: "axis" }, "0"),
    make("text", { x: 40, y: height - 4, class: "axis" }, "0:00"),
    make("text", { x: width, y: height - 4, class: "axis", "text-anchor": "end" }, clock(r.d)));
  return svg;
}

// Sentences, or what lies between silences of a second.
function sentences(r) {
  const found = [];
  for (const [text, start, end] of r.w) {
    const last = found[found.length - 1];
    if (last && start - last[2] <= 1 && !/[.!?]["')]*$/.test(last[0])) {
      last[0] += " " + text;
      last[2] = end;
    } else found.push([text, start, end]);
  }
  return found;
}

function replies(r) {
  const delays = (r.ev || []).filter((e) => e[0] === "reply").map((e) => e[4].toFixed(2));
  return delays.length && `replies after ${delays.join(", ")} s`;
}

// All answers to the recording of r, below each other on one scale.
function takes(r) {
  const all = data.filter((one) => one.k === r.k);
  const longest = Math.max(...all.map((one) => one.d || 0));
  const grid = make("div", { class: "takes" });
  for (const one of all) {
    const name = [one.f, all.some((o) => o.n !== r.n) && one.n].filter(Boolean).join(" / ");
    const picture = make("div", {});
    strip(picture, one, longest);
    const said = (one.w || []).map((w) => w[0]).join(" ");
    grid.append(
      make("p", {}, one === r ? make("strong", {}, name) : name), picture,
      make("p", { class: "soft" }, [one.s !== "done" && one.s, one.e,
        replies(one),
        said && `\u201c${said}\u201d`].filter(Boolean).join(" \u00b7 ")));
  }
  return [make("h2", {}, `Answers to this recording, all on a scale of 0 to ${longest.toFixed(1)} s`), grid];
}

function panel(r, width) {
  const box = make("div", { class: "panel" });
  box.style.width = `${width}px`;
  if (r.k !== undefined) box.append(...takes(r));
  if (r.e) box.append(make("p", {}, make("strong", {}, `${r.s}: `), r.e));
  if (!r.d) {
    if (!r.e) box.append(make("p", {}, `${r.s}: there is no sound to show.`));
    return box;
  }
  const st = r.st || {};
  const facts = [st.voice && `voice ${st.voice}`, st.seed !== undefined && `seed ${st.seed}`,
    st.model && `model ${st.model}`, st.device, st.step_ms &&
    `step p50 ${st.step_ms.p50.toFixed(1)} ms, p95 ${st.step_ms.p95.toFixed(1)} ms, ` +
    `${st.step_ms.late_frames} over 80 ms`, replies(r)].filter(Boolean);
  if (facts.length) box.append(make("p", { class: "soft" }, facts.join(" \u00b7 ")));
  if (st.prompt) box.append(make("p", { class: "soft" }, `Role: ${st.prompt}`));
  let audio = null;
  if (r.a) {
    audio = make("audio", { controls: "", preload: "none", src: r.a });
    audio.addEventListener("error", () => audio.replaceWith(
      make("p", { class: "soft" }, r.a.startsWith("data:") ? "This browser cannot play the sound."
        : `The sound is not beside this page (${r.a}).`)));
    box.append(audio);
  }
  const fit = (width - 30) / r.d;
  let k = Math.max(fit, Math.min(45, 12000 / r.d));
  const wave = make("div", { class: "wave", tabindex: "0", role: "region",
    "aria-label": "picture, scrolls sideways" });
  let line = null;
  function draw(scale) {
    const middle = (wave.scrollLeft + wave.clientWidth / 2) / k;
    k = scale;
    const svg = picture(r, k);
    line = make("line", { x1: 0, x2: 0, y1: 16, y2: 190, class: "play" });
    if (audio) svg.append(line);
    svg.addEventListener("click", (e) => seek((e.clientX - svg.getBoundingClientRect().left) / k));
    wave.replaceChildren(svg);
    wave.scrollLeft = middle * k - wave.clientWidth / 2;
    move();
  }
  function move() {
    if (!audio || !line) return;
    for (const end of ["x1", "x2"]) line.setAttribute(end, audio.currentTime * k);
  }
  function seek(s) {
    const x = s * k;
    if (x < wave.scrollLeft || x > wave.scrollLeft + wave.clientWidth)
      wave.scrollLeft = x - wave.clientWidth / 3;
    if (!audio) return;
    audio.currentTime = s;
    move();
    audio.play();
  }
  wave.print = () => {
    const shown = k;
    draw(PAPER / r.d);
    addEventListener("afterprint", () => draw(shown), { once: true });
  };
  if (audio) for (const event of ["timeupdate", "seeked"]) audio.addEventListener(event, move);
  const used = MARKED.filter((kind) => r.ev.some((event) => event[0] === kind));
  const legend = make("div", { class: "legend" });
  for (const kind of used)
    legend.append(make("span", {}, make("b", {}, KINDS[kind][0]), ` ${KINDS[kind][1]}`));
  const zoom = make("div", { class: "zoom" });
  for (const [name, act, tip] of [["\u2212", () => draw(Math.max(fit, k / 1.6)), "zoom out"],
    ["+", () => draw(Math.min(400, k * 1.6, 30000 / r.d)), "zoom in"], ["all", () => draw(fit), "show all of the recording"]]) {
    const button = make("button", { type: "button", "aria-label": tip, title: tip }, name);
    button.addEventListener("click", act);
    zoom.append(button);
  }
  zoom.append(legend);
  box.append(zoom, wave);
  requestAnimationFrame(() => { draw(k); wave.scrollLeft = 0; });
  if (r.lat) box.append(make("section", {}, make("h2", {}, "Milliseconds a step took"), latency(r)));
  const list = make("ul", { class: "says" });
  for (const [text, start] of sentences(r)) {
    const button = make("button", { type: "button", "aria-label": `go to ${clock(start)}` }, clock(start));
    button.addEventListener("click", () => seek(start));
    list.append(make("li", {}, button, make("span", {}, text)));
  }
  const from = { own: "by its own text", "output.json": "by output.json", asr: "by a recogniser" };
  if (r.w.length) box.append(make("section", {},
    make("h2", {}, `What the agent said, ${from[r.wf] || ""}`), list));
  else box.append(make("p", { class: "soft" }, r.wf === "none"
    ? "What the agent said is not known: there is no JSON transcript beside the sound."
    : "The agent said nothing."));
  return box;
}

function toggle(row) {
  const button = row.querySelector(".open");
  const next = row.nextElementSibling;
  if (next && next.classList.contains("detail")) {
    const audio = next.querySelector("audio");
    if (audio) audio.pause();
    next.remove();
    button.setAttribute("aria-expanded", "false");
    return;
  }
  const width = document.querySelector(".scroll").clientWidth;
  const cell = make("td", { colspan: row.cells.length }, panel(data[row.dataset.i], width));
  row.after(make("tr", { class: "detail" }, cell));
  button.setAttribute("aria-expanded", "true");
}

body.addEventListener("click", (e) => {
  const button = e.target.closest(".open");
  if (button) toggle(button.closest("tr"));
});

function closeAll() {
  for (const row of rows)
    if (row.querySelector(".open").getAttribute("aria-expanded") === "true") toggle(row);
}

document.querySelectorAll("thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const th = button.closest("th");
    const up = th.getAttribute("aria-sort") !== "ascending";
    closeAll();
    for (const other of th.parentNode.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const at = th.cellIndex, value = (row) => row.cells[at].dataset.v;
    const text = button.dataset.kind === "text";
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return a.dataset.i - b.dataset.i;
      if (x === "") return 1;  // what is not known comes last, either way
      if (y === "") return -1;
      const order = text ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  });
});

const find = document.getElementById("find"), bad = document.getElementById("bad");
function filter() {
  const wanted = find.value.toLowerCase();
  let shown = 0;
  closeAll();
  for (const row of rows) {
    const r = data[row.dataset.i];
    const said = () => (r.w || []).map((w) => w[0]).join(" ").toLowerCase();
    const hit = (!bad.checked || r.s !== "done") &&
      (!wanted || [r.n, r.f || "", r.e || ""].join(" ").toLowerCase().includes(wanted) ||
        said().includes(wanted));
    row.hidden = !hit;
    shown += hit;
  }
  document.getElementById("shown").textContent =
    wanted || bad.checked ? `${shown} of ${rows.length}` : "";
  const none = document.getElementById("none");
  none.hidden = shown > 0;
  none.textContent = wanted ? `No recording has \u201c${find.value}\u201d in its name or words` +
    (bad.checked ? " among those that failed, are silent or cut off." : ".")
    : "No recording failed, is silent or cut off.";
}
find.addEventListener("input", filter);
bad.addEventListener("change", filter);

// A table that fits is no box that scrolls, so that its headings stay in the window.
const scroll = document.querySelector(".scroll");
function edge() {
  const right = scroll.scrollLeft + scroll.clientWidth;
  scroll.classList.toggle("more", scroll.scrollWidth - right > 1);
}
new ResizeObserver(() => {
  scroll.classList.remove("fits");
  scroll.classList.toggle("fits", scroll.scrollWidth <= scroll.clientWidth);
  edge();
}).observe(scroll);
scroll.addEventListener("scroll", edge, { passive: true });

// On paper nothing can be opened or scrolled.
addEventListener("beforeprint", () => {
  document.querySelector(".meaning").open = true;
  for (const wave of document.querySelectorAll(".wave")) wave.print();
  for (const row of rows) draw(row);
});

function draw(row) {
  const cell = row.querySelector(".strip");
  if (!cell.firstChild) strip(cell, data[row.dataset.i], common);
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });
rows.forEach((row) => seen.observe(row));

// report.html#call.wav opens that recording.
function openNamed() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { /* as it stands */ }
  const row = rows.find(({ dataset: { i } }) =>
    data[i].n === name || `${data[i].f}/${data[i].n}` === name);
  if (!row) return;
  if (row.querySelector(".open").getAttribute("aria-expanded") !== "true") toggle(row);
  row.scrollIntoView();
}
addEventListener("hashchange", openNamed);
if (rows.length === 1) toggle(rows[0]);
else openNamed();
