import assert from "node:assert/strict";
import { test } from "node:test";

import { Playback } from "../../webui/js/playback.js";

const FPS = 16;
const FRAME = 1000 / FPS;
const REFRESH = 1000 / 60;

/**
 * Plays a trace of batches [{at, count, eventId, chunk}] against a 60 Hz screen.
 * -> {drawn: [{at, id, eventId}], dropped, playback, stalls}
 */
function play(trace, { mode = "low-latency", paced = true, until } = {}) {
  const drawn = [];
  const dropped = [];
  let stalls = 0;
  const playback = new Playback({ fps: FPS, paced, mode, drop: (frame) => dropped.push(frame.id) });
  const waiting = [...trace];
  let id = 0;
  const end = until ?? trace.at(-1).at + 1000;
  for (let now = 0; now < end; now += REFRESH) {
    while (waiting.length && waiting[0].at <= now) {
      const { count, eventId = null, chunk = 0, totalMs } = waiting.shift();
      playback.push(Array.from({ length: count }, () => ({ id: id++, eventId, chunkIndex: chunk })), now);
      if (totalMs) playback.chunkTook(totalMs, 12);
    }
    const frame = playback.take(now);
    if (frame) drawn.push({ at: now, id: frame.id, eventId: frame.eventId });
    if (playback.stalledMs(now)) stalls++;
  }
  return { drawn, dropped, playback, stalls };
}

/** Batches of four frames, a latent frame each, every `4 * FRAME` ms plus `jitter(i)`. */
function paced(batches, { jitter = () => 0, eventId = () => null, start = 0 } = {}) {
  return Array.from({ length: batches }, (_, i) => ({
    at: start + i * 4 * FRAME + jitter(i),
    count: 4,
    chunk: Math.floor(i / 3),
    eventId: eventId(i),
  }));
}

const gaps = (drawn) => drawn.slice(1).map(({ at }, i) => at - drawn[i].at);

test("a steady stream is drawn in full, in order, at its frame rate", () => {
  const { drawn, dropped, stalls } = play(paced(60));
  assert.equal(dropped.length, 0);
  assert.deepEqual(drawn.map(({ id }) => id), [...drawn.keys()]);
  const steady = gaps(drawn.slice(20, 200));
  assert.ok(Math.max(...steady) <= 1.35 * FRAME, `longest gap ${Math.max(...steady)} ms`);
  const mean = steady.reduce((sum, gap) => sum + gap, 0) / steady.length;
  assert.ok(Math.abs(mean - FRAME) < 2, `mean gap ${mean} ms`);
  assert.ok(stalls <= 20, "only the end of the trace counts as a stall");
});

test("the first frame of a session is drawn at once", () => {
  const { drawn } = play([{ at: 100, count: 1 }, { at: 160, count: 4 }, { at: 300, count: 4 }]);
  assert.ok(drawn[0].at - 100 <= REFRESH);
});

test("without jitter the target delay is at its minimum, and no delay accumulates", () => {
  const { playback, drawn } = play(paced(200));
  assert.equal(playback.targetDelay, 150);
  const arrival = (id) => Math.floor(id / 4) * 4 * FRAME;
  const delays = drawn.slice(400, 700).map(({ at, id }) => at - arrival(id));
  assert.ok(Math.max(...delays) < 150 + 4 * FRAME + 80, `a frame waited ${Math.max(...delays)} ms`);
  assert.ok(Math.min(...delays) > 60, `the margin was ${Math.min(...delays)} ms`);
});

test("jitter raises the target delay up to 600 ms; smooth mode keeps more", () => {
  let seed = 3;
  const jitter = (most) => () => ((seed = (seed * 48271) % 2147483647) % 1000) * (most / 1000);
  const rough = play(paced(120, { jitter: jitter(220) }));
  assert.ok(rough.playback.targetDelay > 200 && rough.playback.targetDelay <= 600, `target delay ${rough.playback.targetDelay}`);
  const wild = play(paced(120, { jitter: (i) => (i % 9 === 0 ? 1500 : 0) }).sort((a, b) => a.at - b.at));
  assert.equal(wild.playback.targetDelay, 600);
  const smooth = play(paced(120, { jitter: jitter(220) }), { mode: "smooth" });
  assert.ok(smooth.playback.targetDelay >= 500);
});

test("jitter within the target delay causes no visible pause once it has been measured", () => {
  let seed = 5;
  const jitter = () => ((seed = (seed * 48271) % 2147483647) % 1000) * 0.12;
  const { drawn } = play(paced(240, { jitter }));
  const late = gaps(drawn.slice(300, 900)).filter((gap) => gap > 3 * FRAME);
  assert.equal(late.length, 0, `pauses of ${late} ms`);
});

test("frames that carry a newer event are drawn at once, and older queued frames are dropped", () => {
  const trace = paced(20, { eventId: (i) => (i < 9 ? null : 7) });
  // The server answers the event at once: its first batch comes 240 ms early.
  for (const batch of trace.slice(9)) batch.at -= 240;
  const { drawn, dropped } = play(trace);
  const firstNew = drawn.findIndex(({ eventId }) => eventId === 7);
  assert.ok(drawn[firstNew].at - trace[9].at <= REFRESH, `waited ${drawn[firstNew].at - trace[9].at} ms`);
  assert.ok(dropped.length > 0);
  assert.ok(dropped.every((id) => id < 36), "only older frames are dropped");
  assert.ok(drawn.slice(firstNew).every(({ eventId }) => eventId === 7), "no older frame is drawn afterwards");
});

test("after a cutover the stream goes on without a pause and the delay grows back", () => {
  const trace = paced(60, { eventId: (i) => (i < 9 ? null : 7) });
  for (const batch of trace.slice(9)) batch.at -= 240;
  const { drawn } = play(trace);
  const after = drawn.filter(({ eventId }) => eventId === 7).slice(0, 190);
  assert.ok(Math.max(...gaps(after)) <= 2.2 * FRAME, `pause of ${Math.max(...gaps(after))} ms`);
  const last = after.at(-1);
  const delay = last.at - trace[Math.floor(last.id / 4)].at;
  assert.ok(delay > 80, `delay after the cutover ${delay} ms`);
});

test("several events in a row each cut over, and an event seen before does not", () => {
  const trace = paced(30, { eventId: (i) => [null, 1, 2, 2, 3][Math.min(Math.floor(i / 6), 4)] });
  const { drawn } = play(trace);
  assert.deepEqual([...new Set(drawn.map(({ eventId }) => eventId))], [null, 1, 2, 3]);
});

test("a stall is reported after 0.7 s and ends when frames arrive again", () => {
  const trace = [...paced(12), ...paced(12, { start: 12 * 4 * FRAME + 3000 })];
  const { stalls, drawn } = play(trace, { until: trace.at(-1).at + 400 });
  assert.ok(stalls > 60 && stalls < 180, `${stalls} screen refreshes reported it`);
  assert.equal(drawn.at(-1).id > 80, true);
});

test("a slow server is played at its own rate, not in bursts", () => {
  // 12 frames every 1500 ms, all within 60 ms; the statistics say so.
  const trace = [];
  for (let chunk = 0; chunk < 14; chunk++)
    for (let batch = 0; batch < 3; batch++) trace.push({ at: chunk * 1500 + batch * 20, count: 4, chunk, totalMs: batch === 2 ? 1500 : 0 });
  const { drawn } = play(trace);
  const later = gaps(drawn.filter(({ at }) => at > 9000 && at < 19000));
  assert.ok(Math.max(...later) < 320, `longest gap ${Math.max(...later)} ms, the pace is 125`);
});

test("an unpaced server that is faster than the frame rate is played at its own speed", () => {
  const trace = [];
  for (let chunk = 0; chunk < 40; chunk++)
    for (let batch = 0; batch < 3; batch++) trace.push({ at: chunk * 300 + batch * 100, count: 4, chunk, totalMs: batch === 2 ? 300 : 0 });
  const { playback } = play(trace, { paced: false, until: trace.at(-1).at });
  assert.ok(playback.bufferedMs < 900, `${playback.bufferedMs} ms wait`);
});

test("every frame is either drawn or dropped, once", () => {
  let seed = 11;
  const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  let at = 0;
  const trace = Array.from({ length: 300 }, (_, i) => ({ at: (at += random() * 500), count: 1 + Math.floor(random() * 6), chunk: i, eventId: random() < 0.1 ? i : null }));
  const { drawn, dropped, playback } = play(trace);
  playback.clear();
  const seen = [...drawn.map(({ id }) => id), ...dropped];
  const total = trace.reduce((sum, { count }) => sum + count, 0);
  assert.equal(seen.length, total);
  assert.equal(new Set(seen).size, total);
});

test("a hidden tab keeps a bounded queue, also after the frames ran out, and shows the newest ones when it is back", () => {
  for (const [perBatch, chunks, every] of [[4, 3000, 250], [12, 1500, 750], [96, 200, 9000]]) {
    const dropped = [];
    const playback = new Playback({ fps: FPS, drop: (frame) => dropped.push(frame.id) });
    let id = 0;
    const batch = (chunkIndex) => Array.from({ length: perBatch }, () => ({ id: id++, eventId: null, chunkIndex }));
    playback.push(batch(0), 0);
    for (let now = 0; now < 10_000; now += REFRESH) playback.take(now); // it runs out
    let now = 10_000;
    for (let i = 1; i < chunks; i++) {
      playback.push(batch(i), (now += every));
      assert.ok(playback.bufferedMs <= Math.max(4000, 2 * perBatch * FRAME) + FRAME, `${playback.bufferedMs} ms are queued`);
    }
    const frame = playback.take((now += 10));
    assert.ok(id - frame.id <= Math.max(perBatch, 150 / FRAME + 1), `${id - frame.id} frames behind`);
    playback.clear();
    assert.equal(new Set(dropped).size, dropped.length);
  }
});
