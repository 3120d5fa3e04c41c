import assert from "node:assert/strict";
import { test } from "node:test";

import { Comeback, EventsInFlight, ReceivedFrames } from "../../webui/js/kept.js";
import { explainEnd, stateText } from "../../webui/js/messages.js";
import { SessionLog } from "../../webui/js/session_log.js";
import { forgetTicket, keepTicket, takeTicket } from "../../webui/js/ticket.js";
import { Walk, pictureAt, startOfChunk } from "../../webui/js/walk.js";
import { WorldFileError, readWorldFile } from "../../webui/js/world_file.js";
import { FakeClock } from "./helpers.js";

class FakeStorage {
  values = {};
  getItem = (key) => this.values[key] ?? null;
  setItem = (key, value) => (this.values[key] = value);
  removeItem = (key) => delete this.values[key];
}

test("what was received is the newest chunk of the line that the session is on", () => {
  const received = new ReceivedFrames();
  assert.deepEqual(received.fields, { received_chunk: 0, received_frames: 0 });
  for (const [chunk, frames] of [[0, 9], [1, 4], [1, 8], [2, 4]]) received.add(chunk, frames);
  assert.deepEqual(received.fields, { received_chunk: 2, received_frames: 4 });
  received.resumedAt(2);
  assert.deepEqual(received.fields, { received_chunk: 2, received_frames: 4 });
  received.wentOnAt(2);
  assert.deepEqual(received.fields, { received_chunk: 2, received_frames: 0 });
  received.resumedAt(0);
  assert.deepEqual(received.fields, { received_chunk: 0, received_frames: 0 });
});

test("a refusal is of the event that it names, else of the oldest one that has no answer of its own", () => {
  const events = new EventsInFlight();
  events.add(1, "save", "save");
  events.add(2, "prompt", "a");
  events.add(3, "prompt", "b");
  events.received(1);
  assert.equal(events.refused(null).eventId, 2);
  events.received(3);
  assert.deepEqual(events.takeAll(), ["save"]);
  events.add(4, "rewind", "rewind");
  events.add(5, "branch", "branch");
  assert.equal(events.refused(null), null);
  assert.equal(events.refused(3), null);
  assert.deepEqual(events.refused(4), { eventId: 4, kind: "rewind", message: "rewind" });
  assert.deepEqual(events.takeAll(), ["save", "branch"]);
  for (let id = 6; id < 3000; id++) events.add(id, "prompt", id);
  assert.equal(events.takeAll().length, 1024);
});

test("a lost line is tried at once, then ever more rarely, until the time is over", () => {
  const clock = new FakeClock();
  const tries = [];
  let isOver = false;
  const comeback = new Comeback({
    limitMs: 10_000,
    clock,
    attempt: () => {
      tries.push(clock.now() - 1000);
      comeback.failed();
    },
    giveUp: () => (isOver = true),
  });
  clock.advance(60_000);
  assert.deepEqual(tries, [0, 250, 750, 1750, 3750, 7750]);
  assert.ok(isOver);
});

test("a server that loads is waited for, a network that is back is used at once, and a stopped one tries no more", () => {
  const clock = new FakeClock();
  let tries = 0;
  const comeback = new Comeback({ limitMs: 1000, clock, attempt: () => tries++, giveUp: () => assert.fail("gave up") });
  for (let i = 0; i < 20; i++) {
    clock.advance(4000);
    comeback.failed({ serverLoads: true });
  }
  const before = tries;
  comeback.hurry();
  assert.equal(tries, before + 1);
  comeback.hurry();
  assert.equal(tries, before + 1, "one try at a time");
  comeback.failed({ serverLoads: true });
  comeback.stop();
  clock.advance(60_000);
  assert.equal(tries, before + 1);
});

test("a ticket is for its server and its time, and is taken once", () => {
  const storage = new FakeStorage();
  const init = { prompt: "A lake.", first_frame: new Uint8Array(9), pinned_events: [1], fps: 16 };
  const ticket = { base: "http://a", token: "t", resumeMs: 60_000, leftAt: 1_000_000, picture: null };
  keepTicket({ ...ticket, init }, storage);
  assert.deepEqual(takeTicket("http://a", 1_060_000, storage), { ...ticket, init: { prompt: "A lake.", fps: 16 } });
  assert.equal(takeTicket("http://a", 1_060_000, storage), null);
  keepTicket({ ...ticket, init }, storage);
  assert.equal(takeTicket("http://b", 1_000_000, storage), null);
  keepTicket({ ...ticket, init }, storage);
  assert.equal(takeTicket("http://a", 1_060_001, storage), null);
  keepTicket({ ...ticket, leftAt: undefined, init }, storage);
  assert.equal(takeTicket("http://a", 9e12, storage).token, "t", "a page that crashed did not say when");
  storage.values = { "lingbot-rt.world": "no JSON" };
  assert.equal(takeTicket("http://a", 0, storage), null);
  storage.setItem = () => {
    throw new Error("full");
  };
  keepTicket({ ...ticket, init }, storage);
  forgetTicket(storage);
  assert.equal(takeTicket("http://a", 0, null), null);
});

test("a branch has the chunks before it of the line that it left", () => {
  const dropped = [];
  const walk = new Walk((picture) => dropped.push(picture));
  const go = (from, to, prompt) => {
    for (let chunk = from; chunk < to; chunk++) {
      walk.chunkCame(chunk, 1);
      walk.shown(chunk, prompt, () => `${walk.branch}:${chunk}`);
    }
  };
  go(0, 6, "sun");
  assert.deepEqual(walk.line().map(({ chunk }) => chunk), [1, 2, 3, 4, 5], "from the first chunk that is kept");
  walk.rewound({ branch: 1, at: 3, source: 0 });
  assert.equal(walk.prompt, "sun");
  go(3, 5, "rain");
  assert.deepEqual(walk.line().map(({ picture }) => picture), ["0:1", "0:2", "1:3", "1:4"]);
  assert.deepEqual(walk.line(0).map(({ picture }) => picture), ["0:0", "0:1", "0:2", "0:3", "0:4", "0:5"]);
  walk.rewound({ branch: 2, at: 2, source: 1 });
  assert.equal(walk.prompt, "sun", "the branch was left before the rain");
  go(2, 3, "snow");
  assert.deepEqual(walk.line().map(({ picture }) => picture), ["0:1", "2:2"]);
  walk.rewound({ branch: 1, at: 5, source: 1 });
  assert.equal(walk.prompt, "rain");
  assert.deepEqual(dropped, []);
  walk.rewound({ branch: 1, at: 4, source: 1 });
  assert.deepEqual(dropped, ["1:4"]);
  assert.deepEqual(walk.branches, [0, 1, 2]);
  walk.clear();
  assert.equal(dropped.length, 6 + 2 + 1);
});

test("a page that was loaded again knows the branch, and nothing before it", () => {
  const walk = new Walk();
  walk.resumed(2);
  assert.deepEqual(walk.branches, [2]);
  walk.chunkCame(7, 3);
  assert.deepEqual(walk.line(), [{ chunk: 7, picture: null }]);
  walk.rewound({ branch: 3, at: 7, source: 2 });
  walk.resumed(2);
  assert.deepEqual([walk.branch, walk.branches], [2, [2, 3]]);
  assert.equal(walk.prompt, null);
});

test("pictures are bounded; a chunk without one shows that of the chunk before it", () => {
  const dropped = [];
  const walk = new Walk((picture) => dropped.push(picture));
  for (let chunk = 0; chunk < 700; chunk++) {
    walk.chunkCame(chunk, 0);
    if (chunk % 2 === 0) walk.shown(chunk, "", () => `of ${chunk}`);
    else assert.equal(pictureAt(walk.line(), chunk), `of ${chunk - 1}`);
  }
  for (let chunk = 700; chunk < 5000; chunk++) {
    walk.chunkCame(chunk, 0);
    walk.shown(chunk, "", () => `of ${chunk}`);
  }
  const line = walk.line();
  assert.ok(line.length <= 4096);
  assert.equal(line.filter(({ picture }) => picture !== null).length, 600);
  assert.equal(dropped.length, 350 + 4300 - 600);
  assert.equal(pictureAt(line, line[0].chunk), null);
});

test("chunks begin where the frames before them end", () => {
  assert.deepEqual([0, 1, 2].map((chunk) => startOfChunk(chunk, { num_frames: 9, fps: 12 })), [0, 750, 1750]);
  assert.equal(startOfChunk(1, {}), 562.5);
});

test("the log of a session that went back is the line that leads to where it is", () => {
  const log = new SessionLog({ model: "m", init: { first_frame: new Uint8Array() }, firstFrameType: "", startedAt: "" });
  const add = (eventId, chunk) => {
    log.add({ kind: "prompt", payload: `${eventId}`, eventId, at: 10 * eventId });
    if (chunk !== null) log.applied(eventId, chunk);
  };
  add(1, 0);
  add(2, 3);
  add(3, 5);
  add(4, null);
  log.chunkCame(6);
  const held = { kind: "camera_actions", payload: { mode: "state", transitions: [{ actions: ["w"] }] }, eventId: 9 };
  log.wentBack({ source: 0, branch: 1, chunkIndex: 4, held });
  const events = () => log.events.map(({ event_id, chunk_index }) => [event_id, chunk_index]);
  assert.deepEqual(events(), [[1, 0], [2, 3], [9, 4]]);
  assert.equal(log.toJSON().chunks, 4);
  log.wentBack({ source: 0, branch: 0, chunkIndex: 7, held: { ...held, eventId: 10 } });
  assert.deepEqual(events(), [[1, 0], [2, 3], [3, 5], [10, 7]]);
});

function worldFile({ format = "lingbot_rt world 1", about = { init: { prompt: "A lake.", size: "64x64" } }, shape = [1, 2, 3], cut = 0 } = {}) {
  const header = { __metadata__: { format, world: "{}", about: JSON.stringify(about) }, first_frame: { dtype: "U8", shape, data_offsets: [0, 6] } };
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(text.length), true);
  const file = new Uint8Array([...length, ...text, 1, 2, 3, 4, 5, 6]);
  return new Blob([file.subarray(0, file.length - cut)]);
}

test("a saved world tells its settings and its first frame", async () => {
  const { bytes, init, firstFrame } = await readWorldFile(worldFile());
  assert.deepEqual(init, { prompt: "A lake.", size: "64x64" });
  assert.deepEqual([...firstFrame.data], [1, 2, 3, 255, 4, 5, 6, 255]);
  assert.deepEqual([firstFrame.width, firstFrame.height], [2, 1]);
  assert.equal(bytes.length, worldFile().size);
});

test("other files are refused", async () => {
  const files = [new Blob([]), new Blob(["no world"]), new Blob([new Uint8Array(100).fill(255)]), worldFile({ format: "2" }), worldFile({ about: {} }), worldFile({ cut: 1 }), worldFile({ shape: [2, 2, 3] }), worldFile({ about: { init: { prompt: 5 } } })];
  for (const file of files) await assert.rejects(readWorldFile(file), WorldFileError);
});

test("what the page says of a kept world", () => {
  const end = { code: 1008, message: "invalid generate request: resume: parked for longer", errorCode: "invalid_init", wasLive: false };
  assert.match(explainEnd({ ...end, wasKept: true }).title, /no longer has this world/);
  assert.match(explainEnd(end).title, /refused these settings/);
  assert.match(explainEnd({ code: 1008, message: "", errorCode: "resumed_elsewhere", wasLive: true, wasKept: true }).title, /another window/);
  assert.equal(stateText("away", null), "Back in a moment");
});
