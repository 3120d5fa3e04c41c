import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { decode, encode } from "../../webui/js/msgpack.js";
import { Session } from "../../webui/js/session.js";
import { coldSizeText, explainEnd, inUseText, stateText, warmUpText } from "../../webui/js/messages.js";
import { FakeClock } from "./helpers.js";

let clock, socket, worker, seen, session;

class FakeSocket {
  sent = [];
  closedWith = null;
  send(bytes) {
    this.sent.push(decode(bytes));
  }
  close(code, reason) {
    this.closedWith = { code, reason };
  }
  says(message) {
    this.onmessage({ data: encode(message) });
  }
}

class FakeWorker {
  jobs = [];
  postMessage(job) {
    this.jobs.push(job);
  }
  done(count = 4) {
    const { id } = this.jobs.shift();
    this.onmessage({ data: { id, images: Array.from({ length: count }, () => ({ close() {} })) } });
  }
}

beforeEach(() => {
  clock = new FakeClock();
  socket = new FakeSocket();
  worker = new FakeWorker();
  seen = { states: [], ended: [], frames: [], stats: [], applied: [], skipped: [], refused: [], queue: [], warming: [], opened: [], rewound: [], worlds: [], dropped: [] };
  let eventId = 40;
  session = new Session({
    socket,
    worker,
    clock,
    init: { prompt: "A lake.", first_frame: new Uint8Array([1]) },
    nextEventId: () => eventId++,
    on: {
      state: (state) => seen.states.push(state),
      queue: (position) => seen.queue.push(position),
      warming: (warmUp) => seen.warming.push(warmUp),
      frames: (frames) => seen.frames.push(...frames),
      stats: (stats) => seen.stats.push(stats),
      applied: (...applied) => seen.applied.push(applied),
      skipped: (detail) => seen.skipped.push(detail),
      refused: (detail, event) => seen.refused.push({ detail, event }),
      opened: (opened) => seen.opened.push(opened),
      dropped: ({ kind }) => seen.dropped.push(kind),
      rewound: (place) => seen.rewound.push(place),
      world: (bytes) => seen.worlds.push(bytes),
      ended: (end) => seen.ended.push(end),
    },
  });
});

const batch = (fields = {}) => ({ type: "frame_batch", content_type: "image/webp", num_frames: 4, chunk_index: 0, payload_lengths: [1, 1, 1, 1], payload: new Uint8Array(4), ...fields });

function goLive() {
  socket.onopen();
  socket.says(batch());
  worker.done();
}

test("init is sent first; the session is live with its first decoded frames", () => {
  assert.equal(session.sendKeys([{ actions: ["w"], at: 0 }]), null);
  goLive();
  assert.equal(socket.sent[0].type, "init");
  assert.ok(socket.sent[0].protocol_extensions.includes("control_ack"));
  assert.deepEqual(seen.states, ["opening", "live"]);
  assert.equal(seen.frames.length, 4);
  assert.equal(seen.frames[0].eventId, null);
});

test("the queue position is reported until the session opens", () => {
  socket.onopen();
  socket.says({ type: "queue", position: 2 });
  socket.says({ type: "queue", position: 0 });
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: [] } });
  assert.deepEqual(seen.states, ["opening", "waiting", "opening"]);
  assert.deepEqual(seen.queue, [2, 0]);
});

test("a line whose server falls silent is lost; opening the session may take long", () => {
  socket.onopen();
  const place = { type: "queue", position: 1, waited_ms: 0 };
  for (let i = 0; i < 10; i++) {
    socket.says({ ...place, waited_ms: 5000 * i });
    clock.advance(5000);
  }
  assert.equal(session.state, "waiting");
  socket.says({ ...place, position: 0 });
  clock.advance(120_000);
  assert.equal(session.state, "opening");
  socket.says(place);
  clock.advance(31_000);
  assert.equal(session.state, "lost");
});

test("latency runs from the send to the frame that is drawn with the event, and its parts add up", () => {
  goLive();
  const id = session.sendKeys([{ actions: ["w"], at: clock.now() }]);
  assert.equal(id, 40);
  clock.advance(100);
  socket.says({ type: "control_ack", state: "received", event_id: id });
  socket.says({ type: "control_ack", state: "applied", event_id: id, chunk_index: 3 });
  clock.advance(200);
  socket.says(batch({ event_id: id, chunk_index: 3 }));
  clock.advance(5);
  worker.done();
  clock.advance(10);
  const [sample] = session.latency.drawn(id, clock.now());
  assert.deepEqual(sample, { eventId: 40, chunkIndex: 3, totalMs: 315, parts: { wait: 100, generate: 200, decode: 5, draw: 10 } });
  assert.deepEqual(seen.applied, [[40, 3]]);
  assert.deepEqual(session.latency.drawn(id, clock.now() + 9), []);
});

test("a frame with a newer event also completes older events", () => {
  goLive();
  session.sendKeys([{ actions: ["w"], at: 0 }]);
  clock.advance(30);
  session.sendKeys([{ actions: [], at: 30 }]);
  clock.advance(70);
  assert.deepEqual(session.latency.drawn(41, clock.now()).map(({ totalMs }) => totalMs), [100, 70]);
  assert.equal(session.latency.summary().slowestMs, 100);
});

test("a batch that cannot be read is skipped and reported, and the session continues", () => {
  goLive();
  socket.says(batch());
  worker.onmessage({ data: { id: worker.jobs.shift().id, error: "broken" } });
  socket.onmessage({ data: new Uint8Array([0xc1]) });
  assert.equal(seen.skipped.length, 2);
  socket.says(batch());
  worker.done();
  assert.equal(session.state, "live");
  assert.equal(seen.frames.length, 8);
});

test("while the server compiles for a new size the page says so, and still notices a broken connection", () => {
  socket.onopen();
  socket.says({ type: "warming", session_id: "x", size: "1280x720", expected_ms: 41_300 });
  assert.equal(session.state, "warming");
  assert.deepEqual(seen.warming, [{ size: "1280x720", expectedMs: 41_300 }]);
  assert.match(warmUpText(seen.warming[0]), /1280 × 720.*The last size took 42 s/);
  assert.match(warmUpText({ size: "640x640", expectedMs: null }), /may take minutes/);
  for (let i = 0; i < 20; i++) {
    clock.advance(5000);
    socket.says({ type: "heartbeat", uptime_ms: 1, state: "warming", chunk_index: 0 });
  }
  assert.equal(session.state, "warming");
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: ["heartbeat"] } });
  assert.equal(session.state, "opening");
  socket.says({ type: "warming", session_id: "x", size: "1280x720" });
  clock.advance(31_000);
  assert.equal(session.state, "lost");
});

test("a size that the server has no code for is named before the start", () => {
  assert.equal(coldSizeText({ warmSizes: null }, "64x64"), "");
  assert.equal(coldSizeText({ warmSizes: ["64x64"] }, "64x64"), "");
  assert.match(coldSizeText({ warmSizes: ["64x64"] }, "96x64"), /prepares 96 × 64/);
});

test("unknown messages are ignored", () => {
  goLive();
  socket.says({ type: "confetti", amount: 7 });
  socket.says({ type: "heartbeat", uptime_ms: 5 });
  assert.equal(session.state, "live");
  assert.deepEqual(seen.skipped, []);
});

test("only a clean close is a normal end; any other reports the server's last error", () => {
  goLive();
  socket.says({ type: "error", content: "error during generate loop: out of memory", code: "engine_failed" });
  socket.onclose({ code: 1011, reason: "engine error" });
  assert.deepEqual(seen.ended, [{ normal: false, code: 1011, message: "error during generate loop: out of memory", errorCode: "engine_failed", wasLive: true }]);
  assert.equal(session.state, "lost");
});

test("a complete session ends normally", () => {
  goLive();
  socket.onclose({ code: 1000, reason: "generation complete" });
  assert.equal(seen.ended[0].normal, true);
  assert.deepEqual(seen.states.at(-1), "ended");
});

test("a broken connection is not a normal end, also before the first frame", () => {
  socket.onopen();
  socket.onclose({ code: 1006, reason: "" });
  assert.deepEqual(seen.ended, [{ normal: false, code: 1006, message: "", errorCode: null, wasLive: false }]);
});

test("a refused event is reported and the session continues", () => {
  goLive();
  socket.says({ type: "error", content: "invalid event: kind", code: "invalid_event" });
  assert.deepEqual(seen.refused, [{ detail: "invalid event: kind", event: null }]);
  assert.equal(session.state, "live");
});

test("a refused init closes the socket and reports the reason", () => {
  socket.onopen();
  socket.says({ type: "error", content: "invalid generate request: size: 3x3", code: "invalid_init" });
  assert.equal(socket.closedWith.code, 1000);
  assert.equal(seen.ended[0].message, "invalid generate request: size: 3x3");
  assert.equal(seen.ended[0].normal, false);
});

test("pause and resume are events; stopping is a normal end, reported once", () => {
  goLive();
  session.pause(true);
  session.pause(false);
  assert.deepEqual(socket.sent.slice(1).map(({ kind }) => kind), ["pause", "resume"]);
  assert.deepEqual(seen.states.slice(-2), ["paused", "live"]);
  session.stop();
  session.stop();
  assert.equal(seen.ended.length, 1);
  assert.equal(session.sendKeys([{ actions: ["w"], at: 0 }]), null);
  socket.says(batch());
  assert.equal(worker.jobs.length, 0);
});

test("a connection that broke without a close is noticed by missing heartbeats", () => {
  socket.onopen();
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: ["heartbeat"] } });
  socket.says(batch());
  worker.done();
  for (let i = 0; i < 20; i++) {
    clock.advance(5000);
    socket.says({ type: "heartbeat", uptime_ms: 1, state: "running", chunk_index: i });
  }
  assert.deepEqual(seen.ended, []);
  clock.advance(29_000);
  assert.deepEqual(seen.ended, []);
  clock.advance(2000);
  assert.equal(seen.ended.length, 1);
  assert.equal(seen.ended[0].normal, false);
  assert.match(seen.ended[0].message, /sent nothing/);
  assert.equal(socket.closedWith.code, 4000, "a normal close would end the session for good");
});

test("a computer that slept reads the received messages before it ends the session", () => {
  socket.onopen();
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: ["heartbeat"] } });
  clock.sleep(3_600_000);
  socket.says({ type: "heartbeat", uptime_ms: 1, state: "running", chunk_index: 0 });
  clock.advance(29_000);
  assert.deepEqual(seen.ended, []);
});

test("a payload inside its message is copied to the worker; a separate one is transferred", () => {
  socket.onopen();
  let handed = null;
  worker.postMessage = (job, transfer) => (handed = transfer);
  socket.says(batch());
  assert.deepEqual(handed, []);
  socket.says({ ...batch(), type: "frame_batch_header", payload: undefined });
  socket.onmessage({ data: new Uint8Array(4).buffer });
  assert.equal(handed.length, 1);
});

test("a busy server is a mild card, and the note before the start counts who waits", () => {
  const busy = { code: 1008, errorCode: "session_busy", wasLive: false };
  const refused = explainEnd({ ...busy, message: "another realtime session is already active" });
  const full = explainEnd({ ...busy, message: "another realtime session is already active, and the line is full (--max-waiting 1)" });
  assert.ok(refused.minor && full.minor && refused.title !== full.title);
  assert.ok(!explainEnd({ code: 1011, message: "", errorCode: "engine_failed", wasLive: true }).minor);
  assert.match(inUseText({ waiting: 2, extensions: ["queue"] }), /2 visitors wait .* in line/);
  assert.doesNotMatch(inUseText({ waiting: 0, extensions: [] }), /line/);
});

test("queue positions are ordinals, and every end has a title and advice", () => {
  assert.deepEqual([1, 2, 3, 4, 11, 21].map((position) => stateText("waiting", position)), ["You are next", "2nd in line", "3rd in line", "4th in line", "11th in line", "21st in line"]);
  assert.match(stateText("live", null, true), /replay/i);
  assert.match(stateText("ended", null, true), /replay.*over/i);
  const titles = [1001, 1006, 1008, 1011].map((code) => explainEnd({ code, message: "", errorCode: null, wasLive: true }));
  for (const { title, advice } of titles) assert.ok(title && advice);
  const never = { code: 1006, message: "", errorCode: null, wasLive: false };
  assert.match(explainEnd({ ...never, isBlocked: true }).title, /blocked/);
  assert.doesNotMatch(explainEnd({ ...never, isBlocked: true }).advice, /server runs/);
  assert.match(explainEnd(never).advice, /server runs/);
  assert.match(explainEnd({ code: 1008, message: "another realtime session is already active", errorCode: "session_busy", wasLive: false }).title, /in use/);
});

test("a session tells its token, and a resumed one sends again what was not heard, and the pause", () => {
  goLive();
  socket.says({ type: "session", session_id: "x", resume_token: "t", resume_s: 60 });
  assert.deepEqual(seen.opened, [{ token: "t", resumeMs: 60_000, isResumed: false, branch: 0 }]);
  session.sendPrompt("heard", []);
  session.sendPrompt("not heard", []);
  socket.says({ type: "control_ack", state: "received", event_id: 40 });
  session.pause(true);
  socket.onclose({ code: 1006, reason: "" });
  assert.ok(session.wasPaused);

  const { received, events } = session;
  const next = new FakeSocket();
  const states = [];
  const opened = [];
  const on = { state: (state) => states.push(state), opened: (ticket) => opened.push(ticket), frames() {} };
  const again = new Session({
    socket: next, worker: new FakeWorker(), clock, nextEventId: () => 50, on, received, events, isPaused: true,
    init: { resume: "t", ...received.fields },
  });
  next.onopen();
  assert.deepEqual({ ...next.sent[0], protocol_extensions: null }, { type: "init", resume: "t", received_chunk: 0, received_frames: 4, protocol_extensions: null });
  next.says({ type: "session", session_id: "x", resume_token: "t", resume_s: 60, resumed: true, chunk_index: 1 });
  assert.deepEqual(next.sent.slice(1).map(({ kind, event_id }) => [kind, event_id]), [["composite_input", 41], ["pause", undefined]]);
  assert.deepEqual(states, ["opening", "paused"]);
  socket.says(batch());
  worker.onmessage({ data: { id: 1e9, images: [] } }); // a batch of the line before
  assert.ok(again.isLive && opened[0].isResumed);
});

test("frames of the old line that still decode are not shown after the session went back", () => {
  goLive();
  const id = session.request("branch", { chunk: 0, branch: 0 });
  socket.says(batch({ chunk_index: 1 }));
  socket.says({ type: "rewound", chunk_index: 0, branch: 1, exact: false, event_id: id });
  socket.says(batch({ chunk_index: 0 }));
  assert.deepEqual(seen.rewound, [{ chunkIndex: 0, branch: 1, exact: false, eventId: id }]);
  worker.done();
  assert.equal(seen.frames.length, 4);
  worker.done();
  assert.equal(seen.frames.length, 8);
  assert.deepEqual(session.received.fields, { received_chunk: 0, received_frames: 4 });
  assert.equal(session.latency.drawn(id, clock.now()).length, 0, "no frame answers it");
});

test("a world comes as bytes; a refused way back says which event it was", () => {
  goLive();
  session.request("save", null);
  const id = session.request("rewind", { chunk: 9 });
  socket.says({ type: "world", chunk_index: 1, event_id: 40, payload: new Uint8Array([7]) });
  assert.deepEqual([...seen.worlds[0]], [7]);
  const later = session.request("rewind", { chunk: 0 });
  const error = { type: "error", content: "invalid event: chunk: 9 is not kept", code: "invalid_event", event_id: id };
  socket.says(error);
  assert.deepEqual(seen.refused.map(({ event }) => event.eventId), [id]);
  socket.says({ type: "control_ack", state: "dropped", event_id: later });
  seen.dropped.length = 0;
  assert.equal(id, 41);
  for (const [kind, payload] of [["save", null], ["prompt", "x"]])
    socket.says({ type: "control_ack", state: "dropped", event_id: session.request(kind, payload) });
  assert.deepEqual(seen.dropped, ["save"]);
});
