import assert from "node:assert/strict";
import { test } from "node:test";

import { RawDecoder, splitImages } from "../../webui/js/frames.js";
import { decode, encode } from "../../webui/js/msgpack.js";
import { MessageReader, eventMessage, promptPayload, serverBase, socketUrl, statePayload } from "../../webui/js/wire.js";
import { fromBase64, golden } from "./helpers.js";

const cases = golden("frame_batch_cases").cases;

test("every small golden message is read as its header and a payload of the stated length", () => {
  let read = 0;
  for (const { messages } of cases)
    for (const { form, header, payload_bytes: length, msgpack_b64: bytes } of messages) {
      if (!bytes || form !== "one_message") continue;
      const arrived = new MessageReader().read(fromBase64(bytes));
      assert.deepEqual(arrived.header, header);
      assert.equal(arrived.payload.length, length);
      read++;
    }
  assert.ok(read >= 5, `${read} golden messages`);
});

test("a header and the message after it are one batch", () => {
  const reader = new MessageReader();
  const header = { type: "frame_batch_header", content_type: "application/x-raw-rgb", num_frames: 1 };
  assert.equal(reader.read(encode(header)), null);
  const payload = new Uint8Array([0x81, 1, 2]); // would be a map if it were decoded
  assert.deepEqual(reader.read(payload.buffer), { header, payload });
  assert.deepEqual(reader.read(encode({ type: "from the future" })), { message: { type: "from the future" } });
});

test("the golden delta-gzip stream decodes to its frames, byte for byte", async () => {
  const { frames_b64: frames, messages } = golden("delta_gzip");
  const decoder = new RawDecoder();
  for (const { header, payload_b64: payload, frames: indices } of messages) {
    const decoded = await decoder.decode(header, fromBase64(payload));
    assert.equal(decoded.length, indices.length);
    decoded.forEach((rgba, i) => assert.deepEqual(rgbOf(rgba), fromBase64(frames[indices[i]])));
  }
});

test("raw frames decode to the golden pattern, opaque", async () => {
  const one = cases.find(({ name }) => name === "raw_small");
  const { header, payload } = new MessageReader().read(fromBase64(one.messages[0].msgpack_b64));
  const decoded = await new RawDecoder().decode(header, payload);
  decoded.forEach((rgba, seed) => {
    for (let y = 0; y < header.height; y++)
      for (let x = 0; x < header.width; x++) {
        const pixel = rgba.subarray((y * header.width + x) * 4, (y * header.width + x) * 4 + 4);
        const expected = [0, 1, 2].map((c) => (3 * x + 5 * y + 40 * c + 17 * seed) % 256);
        assert.deepEqual([...pixel], [...expected, 255]);
      }
  });
});

test("a batch whose sizes do not add up is refused, and so is a delta without its reference", async () => {
  const header = { content_type: "application/x-raw-rgb", num_frames: 2, bytes_per_frame: 12, width: 2, height: 2 };
  await assert.rejects(new RawDecoder().decode(header, new Uint8Array(23)), /not 2 frames/);
  const { messages } = golden("delta_gzip");
  const second = messages.find(({ header: h }) => h.delta_reference === "previous-frame");
  await assert.rejects(new RawDecoder().decode(second.header, fromBase64(second.payload_b64)), /missing/);
  const broken = { ...second.header, delta_reference: undefined };
  await assert.rejects(new RawDecoder().decode(broken, new Uint8Array([1, 2, 3])), /decompressed/);
  assert.throws(() => splitImages({ payload_lengths: [3, 4] }, new Uint8Array(8)), /add up/);
});

test("images are split at their lengths", () => {
  const parts = splitImages({ payload_lengths: [1, 3] }, new Uint8Array([1, 2, 3, 4]));
  assert.deepEqual(parts.map((part) => [...part]), [[1], [2, 3, 4]]);
});

test("events have the documented form; without an id there is no event_id key", () => {
  const transitions = [{ actions: ["w"], at: 5 }, { actions: [], at: 9 }];
  const expected = { mode: "state", transitions: [{ actions: ["w"], client_ts_ms: 5 }, { actions: [], client_ts_ms: 9 }] };
  assert.deepEqual(decode(eventMessage("camera_actions", statePayload(transitions), 3)), { type: "event", kind: "camera_actions", payload: expected, event_id: 3 });
  assert.deepEqual(decode(eventMessage("pause", null, undefined)), { type: "event", kind: "pause", payload: null });
  assert.deepEqual(promptPayload("Snow.", ["w"], 1).input_types, ["camera_actions", "prompt"]);
});

test("the server is the page's own host unless an address is typed, in any of the usual forms", () => {
  const page = new URL("http://10.0.0.5:30000/");
  assert.equal(serverBase("", page), "http://10.0.0.5:30000");
  assert.equal(serverBase("", new URL("http://10.0.0.5:18080/")), "http://10.0.0.5:30000");
  assert.equal(serverBase("", new URL("file:///page/index.html")), "http://127.0.0.1:30000");
  assert.equal(serverBase(" box:31000 ", page), "http://box:31000");
  assert.equal(serverBase("ws://box:1/v1/realtime_video/generate", page), "http://box:1");
  assert.equal(serverBase("wss://box/under/", page), "https://box/under");
  assert.equal(serverBase("box", new URL("https://page/")), "https://box");
  assert.equal(serverBase("https://box/world/index.html?x=1", page), "https://box/world");
  for (const end of ["", "/", "/v1", "/v1/", "/v1/models", "/v1/realtime_video/generate"]) assert.equal(serverBase(`http://box/world${end}`, page), "http://box/world");
  assert.equal(serverBase("[::1]:31000", page), "http://[::1]:31000");
  assert.equal(serverBase("my_box", page), "http://my_box");
  for (const wrong of ["ftp://box", "http://", "not a url !!", "a b", "box:99999", "///", "..", "-", "http://a%20b", "javascript:alert(1)", "box,other"])
    assert.throws(() => serverBase(wrong, page), TypeError, wrong);
  assert.equal(socketUrl("https://box", "a b"), "wss://box/v1/realtime_video/generate?api_key=a%20b");
  assert.equal(socketUrl("http://box:1", ""), "ws://box:1/v1/realtime_video/generate");
});

test("below a path every address is below it, and only the real server's ports are asked for the model", () => {
  const socket = (page, isStatic) => socketUrl(serverBase("", new URL(page), isStatic), "");
  const below = { "https://world.example/world/": "wss://world.example/world", "https://world.example/world/index.html": "wss://world.example/world", "https://jupyter.example/user/me/proxy/30000/": "wss://jupyter.example/user/me/proxy/30000", "http://127.0.0.1:30000/": "ws://127.0.0.1:30000", "http://127.0.0.1:18080/": "ws://127.0.0.1:30000", "https://world.example/?server=": "wss://world.example" };
  for (const [page, base] of Object.entries(below)) assert.equal(socket(page), `${base}/v1/realtime_video/generate`);
  assert.equal(serverBase("", new URL("http://box:8000/webui/"), true), "http://box:30000");
  assert.equal(serverBase("", new URL("http://box:8000/webui/"), false), "http://box:8000/webui");
});

const rgbOf = (rgba) => Uint8Array.from(rgba.filter((_, i) => i % 4 !== 3));
