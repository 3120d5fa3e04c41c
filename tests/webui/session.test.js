import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { decode, encode } from "../../webui/js/msgpack.js";
import { WorldSession } from "../../webui/js/session.js";
import { explainEnd, stateWords } from "../../webui/js/words.js";
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
  ended = false;
  postMessage(job) {
    this.jobs.push(job);
  }
  terminate() {
    this.ended = true;
  }
  done(count = 4) {
    const { id } = this.jobs.shift();
    this.onmessage({ data: { id, images: Array.from({ length: count }, () => ({ close() {} })), decodeMs: 1 } });
  }
}

beforeEach(() => {
  clock = new FakeClock();
  socket = new FakeSocket();
  worker = new FakeWorker();
  seen = { states: [], over: [], frames: [], stats: [], applied: [], skipped: [], refused: [], queue: [] };
  let eventId = 40;
  session = new WorldSession({
    socket,
    worker,
    clock,
    init: { prompt: "A lake.", first_frame: new Uint8Array([1]) },
    nextEventId: () => eventId++,
    on: {
      state: (state) => seen.states.push(state),
      queue: (place) => seen.queue.push(place),
      frames: (frames) => seen.frames.push(...frames),
      stats: (stats) => seen.stats.push(stats),
      applied: (...applied) => seen.applied.push(applied),
      skipped: (words) => seen.skipped.push(words),
      refused: (words) => seen.refused.push(words),
      over: (end) => seen.over.push(end),
    },
  });
});

const batch = (fields = {}) => ({ type: "frame_batch", content_type: "image/webp", num_frames: 4, chunk_index: 0, payload_lengths: [1, 1, 1, 1], payload: new Uint8Array(4), ...fields });

function goLive() {
  socket.onopen();
  socket.says(batch());
  worker.done();
}

test("init goes first, then a session comes alive with its first decoded pictures", () => {
  assert.equal(session.sendKeys([{ actions: ["w"], at: 0 }]), null);
  goLive();
  assert.equal(socket.sent[0].type, "init");
  assert.ok(socket.sent[0].protocol_extensions.includes("control_ack"));
  assert.deepEqual(seen.states, ["opening", "live"]);
  assert.equal(seen.frames.length, 4);
  assert.equal(seen.frames[0].eventId, null);
});

test("a place in line is told, and left behind when the session opens", () => {
  socket.onopen();
  socket.says({ type: "queue", position: 2 });
  socket.says({ type: "queue", position: 0 });
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: [] } });
  assert.deepEqual(seen.states, ["opening", "waiting", "opening"]);
  assert.deepEqual(seen.queue, [2, 0]);
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
  assert.deepEqual(sample, { eventId: 40, chunkIndex: 3, totalMs: 315, parts: { wait: 100, make: 200, decode: 5, draw: 10 } });
  assert.deepEqual(seen.applied, [[40, 3]]);
  assert.deepEqual(session.latency.drawn(id, clock.now() + 9), []);
});

test("a newer event answers for older ones that no chunk took up by themselves", () => {
  goLive();
  session.sendKeys([{ actions: ["w"], at: 0 }]);
  clock.advance(30);
  session.sendKeys([{ actions: [], at: 30 }]);
  clock.advance(70);
  assert.deepEqual(session.latency.drawn(41, clock.now()).map(({ totalMs }) => totalMs), [100, 70]);
  assert.equal(session.latency.summary().slowestMs, 100);
});

test("a batch that cannot be read is skipped and said, and the session goes on", () => {
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

test("messages nobody has heard of change nothing", () => {
  goLive();
  socket.says({ type: "confetti", amount: 7 });
  socket.says({ type: "heartbeat", uptime_ms: 5 });
  assert.equal(session.state, "live");
  assert.deepEqual(seen.skipped, []);
});

test("only a clean close is a normal end; any other carries the server's last words", () => {
  goLive();
  socket.says({ type: "error", content: "error during generate loop: out of memory", code: "engine_failed" });
  socket.onclose({ code: 1011, reason: "engine error" });
  assert.deepEqual(seen.over, [{ normal: false, code: 1011, words: "error during generate loop: out of memory", errorCode: "engine_failed", wasLive: true }]);
  assert.equal(session.state, "lost");
  assert.ok(worker.ended);
});

test("a world that is complete ends normally, a line that breaks does not", () => {
  goLive();
  socket.onclose({ code: 1000, reason: "generation complete" });
  assert.equal(seen.over[0].normal, true);
  assert.deepEqual(seen.states.at(-1), "ended");
});

test("a broken line is never a normal end, before and after the first picture", () => {
  socket.onopen();
  socket.onclose({ code: 1006, reason: "" });
  assert.deepEqual(seen.over, [{ normal: false, code: 1006, words: "", errorCode: null, wasLive: false }]);
});

test("a refused event is said while the world goes on; a refused init ends the attempt", () => {
  goLive();
  socket.says({ type: "error", content: "invalid event: kind", code: "invalid_event" });
  assert.deepEqual(seen.refused, ["invalid event: kind"]);
  assert.equal(session.state, "live");
});

test("a refused init closes the socket and tells why", () => {
  socket.onopen();
  socket.says({ type: "error", content: "invalid generate request: size: 3x3", code: "invalid_init" });
  assert.equal(socket.closedWith.code, 1000);
  assert.equal(seen.over[0].words, "invalid generate request: size: 3x3");
  assert.equal(seen.over[0].normal, false);
});

test("pause and resume are events of their own; leaving is a normal end, told once", () => {
  goLive();
  session.pause(true);
  session.pause(false);
  assert.deepEqual(socket.sent.slice(1).map(({ kind }) => kind), ["pause", "resume"]);
  assert.deepEqual(seen.states.slice(-2), ["paused", "live"]);
  session.stop();
  session.stop();
  assert.equal(seen.over.length, 1);
  assert.equal(session.sendKeys([{ actions: ["w"], at: 0 }]), null);
  socket.says(batch());
  assert.equal(worker.jobs.length, 0);
});

test("a line that died without a close is noticed by the silence of a server whose heart beats", () => {
  socket.onopen();
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: ["heartbeat"] } });
  socket.says(batch());
  worker.done();
  for (let i = 0; i < 20; i++) {
    clock.advance(5000);
    socket.says({ type: "heartbeat", uptime_ms: 1, state: "running", chunk_index: i });
  }
  assert.deepEqual(seen.over, []);
  clock.advance(29_000);
  assert.deepEqual(seen.over, []);
  clock.advance(2000);
  assert.equal(seen.over.length, 1);
  assert.equal(seen.over[0].normal, false);
  assert.match(seen.over[0].words, /Nothing was heard/);
  assert.equal(socket.closedWith.code, 1000);
});

test("a computer that slept reads what came meanwhile before it gives the server up", () => {
  socket.onopen();
  socket.says({ type: "session", session_id: "x", capabilities: { extensions: ["heartbeat"] } });
  clock.sleep(3_600_000);
  socket.says({ type: "heartbeat", uptime_ms: 1, state: "running", chunk_index: 0 });
  clock.advance(29_000);
  assert.deepEqual(seen.over, []);
});

test("a payload that is part of its message is not handed over with the buffer it lies in", () => {
  socket.onopen();
  let handed = null;
  worker.postMessage = (job, transfer) => (handed = transfer);
  socket.says(batch());
  assert.deepEqual(handed, []);
  socket.says({ ...batch(), type: "frame_batch_header", payload: undefined });
  socket.onmessage({ data: new Uint8Array(4).buffer });
  assert.equal(handed.length, 1);
});

test("a place in line and every end read as a sentence with something to do", () => {
  assert.deepEqual([1, 2, 3, 4, 11, 21].map((place) => stateWords("waiting", place)), ["You are next", "2nd in line", "3rd in line", "4th in line", "11th in line", "21st in line"]);
  const titles = [1001, 1006, 1008, 1011].map((code) => explainEnd({ code, words: "", errorCode: null, wasLive: true }));
  for (const { title, advice } of titles) assert.ok(title && advice);
  assert.match(explainEnd({ code: 1008, words: "another realtime session is already active", errorCode: "session_busy", wasLive: false }).title, /Someone else/);
});
