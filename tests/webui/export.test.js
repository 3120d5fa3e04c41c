import assert from "node:assert/strict";
import { test } from "node:test";

import { cropFor } from "../../webui/js/first_frame.js";
import { mp4File } from "../../webui/js/mp4.js";
import { Replay, SessionFileError, SessionLog, parseSession } from "../../webui/js/session_log.js";
import { pythonSnippet } from "../../webui/js/snippet.js";

const init = { prompt: "A \"lake\".", size: "160x96", seed: 7, realtime_output_pacing: true, first_frame: new Uint8Array([0, 1, 2, 255]) };

function exampleLog() {
  const log = new SessionLog({ model: "m", init, firstFrameType: "image/png", startedAt: "2026-01-01T00:00:00Z" });
  for (const [eventId, at] of [[5, 10], [6, 20], [7, 900], [8, 2000]]) log.add({ kind: "camera_actions", payload: { mode: "state", transitions: [] }, eventId, at });
  return log;
}

test("an event belongs to the chunk that applied it, and so do older events without a chunk", () => {
  const log = exampleLog();
  log.applied(6, 1);
  log.applied(7, 3);
  assert.deepEqual(log.events.map(({ chunk_index }) => chunk_index), [1, 1, 3, null]);
});

test("a saved session is loaded with its first frame and events", () => {
  const log = exampleLog();
  log.applied(6, 1);
  const loaded = parseSession(JSON.stringify(log));
  assert.deepEqual(loaded.init, init);
  assert.deepEqual(loaded.events, log.events);
  assert.equal(loaded.model, "m");
});

test("a replay is as long as the session was; files that do not say it go on a little after their last event", () => {
  const log = exampleLog();
  log.applied(7, 11);
  log.chunkCame(29);
  const text = JSON.stringify(log);
  assert.equal(parseSession(text).chunks, 30);
  for (const other of ["null", "-1", '"9"']) {
    const { chunks } = parseSession(text.replace('"chunks":30', `"chunks":${other}`));
    assert.ok(chunks > 12 && chunks < 30, `${chunks} chunks`);
  }
});

test("files that are not sessions are refused", () => {
  const good = JSON.stringify(exampleLog());
  const broken = ["", "{}", "null", "[]", good.replace('"version":1', '"version":9'), good.replace(/"base64":"[^"]*"/, '"base64":"*"'), good.replace(/"prompt":/, '"no":')];
  for (const text of broken) assert.throws(() => parseSession(text), SessionFileError);
});

test("a replay sends each event one chunk ahead, in order, and all of them in the end", () => {
  const events = [[1, 0], [2, 1], [3, null], [4, 4]].map(([event_id, chunk_index]) => ({ event_id, chunk_index }));
  const replay = new Replay(events);
  const ids = (list) => list.map(({ event_id }) => event_id);
  assert.deepEqual(ids(replay.takeDue(-1)), [1]);
  assert.deepEqual(ids(replay.takeDue(0)), [2, 3]);
  assert.deepEqual(ids(replay.takeDue(2)), []);
  assert.deepEqual(ids(replay.takeDue(3)), [4]);
  assert.deepEqual(ids(replay.takeDue(1000)), []);
});

test("an MP4's boxes nest without gaps, and its sample table finds every frame", () => {
  const samples = [[1, 2, 3], [4], [5, 6]].map((bytes, i) => ({ data: new Uint8Array(bytes), isKey: i === 0, at: i * 62.5 }));
  const parts = mp4File({ width: 160, height: 96, description: new Uint8Array([1, 66, 0, 30]), samples, end: 200 });
  const file = Buffer.concat(parts);
  assert.deepEqual(boxes(file, 0, file.length).map(({ type }) => type), ["ftyp", "mdat", "moov"]);
  const find = (path) => path.split("/").reduce((at, type) => boxes(file, at.start, at.end).find((box) => box.type === type), { start: 0, end: file.length });
  const table = "moov/trak/mdia/minf/stbl";
  const sizes = find(`${table}/stsz`);
  assert.deepEqual([12, 16, 20].map((offset) => file.readUInt32BE(sizes.start + offset)), [3, 1, 2]);
  const offset = file.readUInt32BE(find(`${table}/stco`).start + 8);
  assert.deepEqual([...file.subarray(offset, offset + 6)], [1, 2, 3, 4, 5, 6]);
  const times = find(`${table}/stts`);
  const durations = [12, 20, 28].map((at) => file.readUInt32BE(times.start + at));
  assert.equal(durations.reduce((sum, duration) => sum + duration, 0), 18000);
  assert.equal(file.readUInt32BE(find("moov/mvhd").start + 16), 18000);
  assert.equal(file.readUInt32BE(find(`${table}/stss`).start + 4), 1);
});

test("the crop is the largest part of the image with the target's aspect ratio", () => {
  for (const [width, height] of [[1000, 500], [500, 1000], [160, 96], [833, 481]])
    for (const focus of [{ x: 0, y: 0 }, { x: 0.5, y: 0.5 }, { x: 1, y: 1 }]) {
      const crop = cropFor(width, height, { width: 160, height: 96 }, focus);
      assert.ok(Math.abs(crop.width / crop.height - 160 / 96) < 1e-9);
      assert.ok(Math.abs(crop.width - width) < 1e-9 || Math.abs(crop.height - height) < 1e-9);
      assert.ok(crop.x >= 0 && crop.y >= 0 && crop.x + crop.width <= width + 1e-9 && crop.y + crop.height <= height + 1e-9);
    }
});

test("the Python program has every setting as a Python literal", () => {
  const program = pythonSnippet({ base: "http://127.0.0.1:30000", hasKey: false }, { ...init, enable_upscaling: false });
  assert.match(program, /prompt="A \\"lake\\"\."/);
  assert.match(program, /realtime_output_pacing=True,/);
  assert.match(program, /seed=7,/);
  assert.doesNotMatch(program, /first_frame=\[|protocol_extensions|api_key|upscaling/);
  assert.match(pythonSnippet({ base: "http://127.0.0.1:30000", hasKey: true }, init), /api_key="/);
});

function boxes(file, start, end) {
  const found = [];
  for (let at = start; at < end; ) {
    const size = file.readUInt32BE(at);
    assert.ok(size >= 8 && at + size <= end, `box of ${size} bytes at ${at}`);
    found.push({ type: file.toString("latin1", at + 4, at + 8), start: at + 8, end: at + size });
    at += size;
  }
  return found;
}
