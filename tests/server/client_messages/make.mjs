// Packs the same messages with the encoders of published clients and writes messages.json beside this file.
//
//   npm install msgpackr@VERSION msgpack-lite@VERSION @msgpack/msgpack@VERSION   (in a folder of your own)
//   cp make.mjs THAT_FOLDER && node make.mjs app.js > messages.json
//
// app.js is the script of the reference's page (apps/realtime_webui), whose function `pack` is run as it stands; here
// that of commit 00e7d61 of sgl-project/sglang. The versions of the libraries are in messages.json.

import { readFileSync } from "node:fs";
import { Packr, pack } from "msgpackr";
import lite from "msgpack-lite";
import { encode } from "@msgpack/msgpack";

const pagePack = functionOf(readFileSync(process.argv[2], "utf8"), "pack");

const picture = Buffer.from(
  "iVBORw0KGgoAAAANSUhEUgAAAAkAAAAJCAIAAABv85FHAAABB0lEQVR4nAH8AAP/APfBvc6SGewU9NLuLAScnjs162wtxlEfzCMG" +
    "hQDdOJEHlA0OFQmPzxcXBigKVDpn4G3hyAeeGRoAonkgKMhCRaXjJzGysIg+DLv+P10HB5sYHJyRAb1y2sm0iWZY5PYpzWbc+1AI" +
    "W7cX0h6MqCZ7fAFtN5XciajiLbG2zh/r/bN8NQyrsqFQKeEk+PkBV8Tp+c9GthJlIdgRALiVitde1dGiOBEPAqsIAO9ypmC40a8S" +
    "S7Az+GxdofDEBGNLMfalIvlhYABPZsAHCjwsRuMcWaOoCDzMlOYRoj0Nv6Z3clACasmqc+qIBzSTXCwdG/5CiYxaCwe9pmeQkxJQ" +
    "7hpxO3PxKxwAAAAASUVORK5CYII=",
  "base64",
);

const init = {
  type: "init",
  prompt: "A quiet street in the rain, é 雪 🙂. ".repeat(8),
  first_frame: picture,
  size: "64x64",
  fps: 25,
  num_frames: 9,
  seed: 70000,
  num_inference_steps: undefined,
  guidance_scale: 1,
  max_chunks: 5,
  realtime_output_format: "webp",
  output_compression: 95,
  frame_interpolation_scale: 0.5,
  condition_inputs: { camera_actions: [["w"], ["w", "l"], []] },
};

// The fields that the page sends with its own defaults and "server default" as the format.
const pageInit = {
  type: "init",
  prompt: "A quiet street in the rain.",
  size: "64x64",
  fps: 25,
  num_frames: 9,
  seed: 70000,
  num_inference_steps: 4,
  guidance_scale: 1,
  realtime_causal_sink_size: 3,
  realtime_causal_kv_cache_num_frames: 9,
  max_chunks: 3,
  first_frame: new Uint8Array(picture),
};

const state = (...times) => ({
  mode: "state",
  transitions: [
    { actions: ["w"], client_ts_ms: times[0] },
    { actions: ["w", "l"], client_ts_ms: times[1] },
  ],
});

const events = [
  { type: "event", kind: "camera_actions", payload: state(1764345600123.5, 70000), event_id: 1 },
  { type: "event", kind: "prompt", payload: "Snow falls. ".repeat(30), event_id: 300 },
  {
    type: "event",
    kind: "composite_input",
    payload: { input_types: ["prompt", "camera_actions"], prompt: "Night.", camera_actions: [["a"], ["a"], []] },
    event_id: 70000,
  },
  {
    type: "event",
    kind: "camera_poses",
    payload: {
      poses: [0, 0.25, 0.5].map((z) => [
        [1, 0, 0, -2],
        [0, 1, 0, 0.125],
        [0, 0, 1, z],
        [0, 0, 0, 1],
      ]),
      intrinsics: [500, 500.5, 416, 240],
      size: "832x480",
    },
    event_id: 70001,
  },
];

const plain = new Packr({ useRecords: false });
const libraries = {
  page: pagePack,
  msgpackr: pack,
  "msgpackr, useFloat32": (value) => new Packr({ useRecords: false, useFloat32: 4 }).pack(value),
  "msgpackr, variableMapSize": (value) => new Packr({ useRecords: false, variableMapSize: true }).pack(value),
  "msgpack-lite": lite.encode,
  "@msgpack/msgpack": encode,
};

const shared = new Packr({ structures: [], saveStructures() {} });
shared.pack(events[0]);
const withView = { ...init, first_frame: new Uint8Array(picture) };
const withDate = { ...events[0], payload: state(new Date(1764345600123), 1) };
const refused = {
  "msgpackr, records": new Packr().pack(init),
  "msgpackr, shared structures": shared.pack(events[0]),
  "msgpackr, bundleStrings": new Packr({ useRecords: false, bundleStrings: true }).pack(init),
  "msgpackr, moreTypes": new Packr({ useRecords: false, moreTypes: true }).pack(withView),
  "msgpack-lite, Uint8Array": lite.encode(withView),
  "msgpack-lite, ArrayBuffer": lite.encode({ ...init, first_frame: withView.first_frame.buffer }),
  "msgpackr, Date": plain.pack(withDate),
  "msgpack-lite, Date": lite.encode(withDate),
  "@msgpack/msgpack, Date": encode(withDate),
};

const text = (bytes) => Buffer.from(bytes).toString("base64");
const packable = (value) => Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined));
const version = (name) => JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version;

const messages = {
  versions: Object.fromEntries(["msgpackr", "msgpack-lite", "@msgpack/msgpack"].map((name) => [name, version(name)])),
  page_init: text(pagePack(pageInit)),
  read: Object.fromEntries(
    Object.entries(libraries).map(([name, packed]) => [
      name,
      [
        // The page takes a Uint8Array and leaves undefined fields out, as it does itself.
        text(packed(name === "page" ? packable({ ...init, first_frame: new Uint8Array(picture) }) : init)),
        ...events.map((event) => text(packed(event))),
      ],
    ]),
  ),
  refused: Object.fromEntries(Object.entries(refused).map(([name, bytes]) => [name, text(bytes)])),
};
console.log(JSON.stringify(messages, null, 1));

/** A function of a script's own top level, by its name. */
function functionOf(script, name) {
  const start = script.indexOf(`function ${name}(`);
  let depth = 0;
  for (let at = start; ; at++) {
    if (script[at] === "{") depth++;
    if (script[at] === "}" && --depth === 0) return new Function(`${script.slice(start, at + 1)}; return ${name};`)();
  }
}
