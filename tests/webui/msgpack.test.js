import assert from "node:assert/strict";
import { test } from "node:test";

import { decode, encode } from "../../webui/js/msgpack.js";
import { fromBase64, golden } from "./helpers.js";

test("the golden chunk_stats and error bytes decode to their maps, and the page encodes the same bytes", () => {
  const messages = golden("control_messages");
  for (const name of ["chunk_stats", "error"]) {
    const { message, msgpack_b64: bytes } = messages[name];
    assert.deepEqual(decode(fromBase64(bytes)), message);
    assert.deepEqual(encode(message), fromBase64(bytes));
  }
});

test("values of every size survive encode and decode", () => {
  const values = [
    null, true, false, 0, 1, 127, 128, 255, 256, 65535, 65536, 0xffffffff, 2 ** 40, Number.MAX_SAFE_INTEGER, -1, -32, -33, -70000, 0.1, -1e300, Infinity,
    "", "ä€😀", "x".repeat(31), "x".repeat(32), "x".repeat(256), "x".repeat(70000), [], [[], [1, [2]]], Array(16).fill(7), Array(70000).fill(1),
    {}, { a: { b: [1, "c", null] } }, Object.fromEntries(Array.from({ length: 20 }, (_, i) => [`k${i}`, i])),
  ];
  for (const value of values) assert.deepEqual(decode(encode(value)), value);
});

test("byte strings of every size survive encode and decode", () => {
  for (const length of [0, 255, 256, 65535, 65536]) {
    const bytes = new Uint8Array(length).fill(9);
    const back = decode(encode({ payload: bytes })).payload;
    assert.deepEqual(back, bytes);
  }
});

test("integers beyond 32 bits and below -32 are written as float64, since some clients cannot read them", () => {
  for (const value of [2 ** 32, 2 ** 53 - 1, -33, -1000]) assert.equal(encode(value)[0], 0xcb);
});

test("a key whose value is undefined is left out", () => {
  assert.deepEqual(decode(encode({ a: 1, event_id: undefined })), { a: 1 });
});

test("a truncated message and one with trailing bytes are refused", () => {
  const whole = encode({ type: "error", content: "words", list: [1, 2.5, "x"], bin: new Uint8Array(40) });
  for (let length = 0; length < whole.length; length++) assert.throws(() => decode(whole.subarray(0, length)), RangeError);
  assert.throws(() => decode(new Uint8Array([...whole, 0])), RangeError);
  assert.throws(() => decode(new Uint8Array(500).fill(0x91)), /deeply/);
  assert.throws(() => decode(new Uint8Array([0xc1])), RangeError);
});
