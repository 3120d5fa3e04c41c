// The meters: three readings, a chart, and the time breakdown of the last chunks.

import { h } from "./dom.js";

const POINTS = 120;
const SHOWN_CHUNKS = 8;
const NAMES = {
  wait: "Waiting",
  dit: "DiT",
  vae: "VAE decode",
  encode: "Encoding",
  wire: "Sending",
  unpack: "Unpacking",
  draw: "Display",
};
const PARTS = ["wait", "dit", "vae", "encode", "wire", "draw"];
const CHUNK_TABLE = [
  ["chunk_total_ms", "Whole chunk"],
  ["queue_wait_ms", `${NAMES.wait} for the engine`],
  ["pace_wait_ms", `${NAMES.wait} for real time`],
  ["request_prepare_ms", "Sampling inputs"],
  ["scheduler_forward_ms", "Engine total"],
  ["dit_ms", NAMES.dit],
  ["vae_ms", NAMES.vae],
  ["encode_ms", NAMES.encode],
  ["ws_write_ms", NAMES.wire],
  ["event_latency_ms", "Key to send"],
];
/** The engine's own stages, by name. Those that the table above has already are left out. */
const ENGINE_STAGES = { denoise: `${NAMES.dit}: denoising`, context: `${NAMES.dit}: context pass`, vae: null };

/** chunk_stats and the page's own display time -> {wait, dit, vae, encode, wire, draw} in ms. */
function chunkParts(stats, drawMs) {
  return {
    wait: (stats.queue_wait_ms ?? 0) + (stats.pace_wait_ms ?? 0),
    dit: stats.dit_ms ?? stats.scheduler_forward_ms ?? 0,
    vae: stats.vae_ms ?? 0,
    encode: stats.encode_ms ?? stats.raw_payload_build_ms ?? 0,
    wire: stats.ws_write_ms ?? 0,
    draw: drawMs,
  };
}

const LATENCY_PARTS = [
  ["wait", NAMES.wait],
  ["generate", "Generating"],
  ["decode", NAMES.unpack],
  ["draw", NAMES.draw],
];

/** The parts of a latency sample as text: "Waiting 310 ms, Generating 240 ms, ...". */
export const latencyText = (parts) =>
  LATENCY_PARTS.map(([name, label]) => `${label} ${Math.round(parts[name])} ms`).join(", ");

export class MetersView {
  #root;
  #readings = {};
  #chart = null;
  #chartBox;
  #stages;
  #chunks = [];
  #times = [];
  #latencies = [];
  #buffers = [];
  #latest = null;
  #summary = null;
  #showStages;
  #store;

  constructor(root, store) {
    this.#root = root;
    this.#store = store;
    this.#showStages = store.get("stages", false);
    const reading = (name, label) => {
      this.#readings[name] = h("b", { textContent: "–" });
      return h("div", { className: "reading" }, this.#readings[name], h("span", { textContent: label }));
    };
    this.#chartBox = h("div", { className: "chart", "aria-hidden": "true" });
    this.#stages = h("div", { className: "stages", hidden: !this.#showStages });
    const more = h("button", {
      className: "meters-more",
      textContent: this.#moreText(),
      "aria-expanded": String(this.#showStages),
      onclick: () => {
        this.#showStages = !this.#showStages;
        this.#store.set("stages", this.#showStages);
        more.textContent = this.#moreText();
        more.setAttribute("aria-expanded", String(this.#showStages));
        this.#stages.hidden = !this.#showStages;
        this.#drawStages();
      },
    });
    this.#root.append(
      h(
        "div",
        { className: "readings" },
        reading("latency", "key to frame"),
        reading("fps", "frames per second"),
        reading("buffer", "buffered"),
        this.#chartBox,
      ),
      more,
      this.#stages,
    );
  }

  get isOpen() {
    return !this.#root.hidden;
  }

  async toggle() {
    this.#root.hidden = !this.#root.hidden;
    if (!this.isOpen) return;
    if (!this.#chart) await this.#makeChart();
    this.#drawStages();
  }

  /** New readings, a few per second while the session is live. */
  update({ now, latencyMs, fps, bufferMs }) {
    this.#times.push(now / 1000);
    this.#latencies.push(latencyMs);
    this.#buffers.push(bufferMs);
    for (const series of [this.#times, this.#latencies, this.#buffers]) if (series.length > POINTS) series.shift();
    if (!this.isOpen) return;
    set(this.#readings.latency, latencyMs === null ? null : Math.round(latencyMs), "ms");
    set(this.#readings.fps, fps, "/s");
    set(this.#readings.buffer, Math.round(bufferMs), "ms");
    this.#chart?.setData([this.#times, this.#latencies, this.#buffers]);
  }

  /** The summary of the session's latency samples. */
  latency(summary) {
    this.#summary = summary;
  }

  chunk(stats, drawMs) {
    this.#latest = stats;
    this.#chunks.push({ index: stats.chunk_index, total: stats.chunk_total_ms, parts: chunkParts(stats, drawMs) });
    if (this.#chunks.length > SHOWN_CHUNKS) this.#chunks.shift();
    if (this.isOpen && this.#showStages) this.#drawStages();
  }

  clear() {
    for (const list of [this.#chunks, this.#times, this.#latencies, this.#buffers]) list.length = 0;
    this.#latest = this.#summary = null;
    this.#drawStages();
  }

  #moreText() {
    return this.#showStages ? "Hide the time breakdown" : "Show the time breakdown";
  }

  #drawStages() {
    if (!this.#chunks.length) {
      this.#stages.replaceChildren(h("p", { className: "hint", textContent: "Available while a session is live." }));
      return;
    }
    const sum = ({ parts }) => PARTS.reduce((total, name) => total + parts[name], 0);
    const longest = Math.max(...this.#chunks.map(sum));
    const rows = [...this.#chunks].reverse().map((chunk) => {
      const track = h("span", { className: "track" });
      let at = 0;
      for (const name of PARTS) {
        const share = (100 * chunk.parts[name]) / longest;
        const bar = h("i", { className: `p-${name}`, title: `${NAMES[name]}: ${Math.round(chunk.parts[name])} ms` });
        bar.style.left = `${at}%`;
        bar.style.width = `${share}%`;
        at += share;
        track.append(bar);
      }
      return h(
        "div",
        { className: "fall" },
        h("span", { textContent: `#${chunk.index}` }),
        track,
        h("span", { textContent: `${chunk.total} ms` }),
      );
    });
    const legend = PARTS.map((name) => h("span", {}, h("i", { className: `p-${name}` }), NAMES[name]));
    const known = CHUNK_TABLE.filter(([key]) => typeof this.#latest[key] === "number");
    const stages = Object.entries(this.#latest.stages ?? {})
      .map(([name, ms]) => [name in ENGINE_STAGES ? ENGINE_STAGES[name] : name, Math.round(ms * 10) / 10])
      .filter(([label]) => label);
    const entries = [...known.map(([key, label]) => [label, this.#latest[key]]), ...stages];
    const table = entries.map(([label, ms]) =>
      h("div", {}, h("dt", { textContent: label }), h("dd", { textContent: `${ms} ms` })),
    );
    const summary = this.#summary;
    const total = (ms) => `${Math.round(ms)} ms`;
    const spread =
      summary &&
      `Key to frame over ${summary.count} events: median ${total(summary.medianMs)}, ` +
        `slowest ${total(summary.slowestMs)}. Medians of the parts: ${latencyText(summary.parts)}.`;
    this.#stages.replaceChildren(
      ...(spread ? [h("p", { className: "hint", textContent: spread })] : []),
      h("div", { className: "waterfall" }, ...rows),
      h("div", { className: "legend" }, ...legend),
      h("dl", { className: "stage-table" }, ...table),
    );
  }

  async #makeChart() {
    await loadScript("vendor/uPlot.iife.min.js");
    document.head.append(h("link", { rel: "stylesheet", href: "vendor/uPlot.min.css" }));
    const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const line = (label, stroke, width) => ({ label, stroke, width, spanGaps: true, points: { show: false } });
    const size = () => ({ width: Math.max(this.#chartBox.clientWidth, 100), height: 76 });
    const axis = {
      stroke: color("--soft"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false },
      font: "11px Inter",
    };
    const options = {
      ...size(),
      legend: { show: false },
      cursor: { show: false },
      padding: [6, 4, 4, 0],
      scales: { y: { range: (_, __, max) => [0, Math.max(max || 0, 200) * 1.1] } },
      axes: [
        { show: false },
        {
          ...axis,
          size: 54,
          splits: (_, __, low, high) => [0, roundHalf(high / 2)].filter((v) => v >= low),
          values: (_, all) => all.map((v) => `${v} ms`),
        },
      ],
      series: [{}, line("key to frame", color("--accent"), 2), line("buffered", color("--soft"), 1)],
    };
    this.#chart = new globalThis.uPlot(options, [this.#times, this.#latencies, this.#buffers], this.#chartBox);
    new ResizeObserver(() => this.#chart.setSize(size())).observe(this.#chartBox);
  }
}

const roundHalf = (value) => Math.round(value / 50) * 50;

function set(element, value, unit) {
  element.replaceChildren(...(value === null ? ["–"] : [String(value), h("small", { textContent: ` ${unit}` })]));
}

function loadScript(src) {
  return new Promise((resolve, reject) => document.head.append(h("script", { src, onload: resolve, onerror: reject })));
}
