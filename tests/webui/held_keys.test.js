import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { defaultBindings, rebind, stickTokens, tokenFor, LOOK, MOVE } from "../../webui/js/bindings.js";
import { HeldKeys, TransitionSender } from "../../webui/js/held_keys.js";
import { FakeClock } from "./helpers.js";

let clock, sent, sender, held;

beforeEach(() => {
  clock = new FakeClock();
  sent = [];
  sender = new TransitionSender((transitions) => sent.push({ at: clock.time, keys: transitions.map(({ actions }) => actions.join("")) }), clock);
  held = new HeldKeys((actions) => sender.change(actions));
});

test("the first transition leaves at once, those within 16 ms leave together and in order", () => {
  held.hold("key:w", ["w"]);
  assert.deepEqual(sent, [{ at: 1000, keys: ["w"] }]);
  clock.advance(5);
  held.hold("key:a", ["a"]);
  held.release("key:w");
  clock.advance(5);
  held.release("key:a");
  assert.equal(sent.length, 1);
  clock.advance(20);
  assert.deepEqual(sent[1], { at: 1016, keys: ["wa", "a", ""] });
  clock.advance(100);
  held.hold("key:d", ["d"]);
  assert.deepEqual(sent[2], { at: clock.time, keys: ["d"] });
});

test("an action stays held until its last source lets go", () => {
  held.hold("key:KeyW", ["w"]);
  held.hold("stick", ["w", "d"]);
  held.release("key:KeyW");
  assert.deepEqual(held.actions, ["w", "d"]);
  held.release("stick");
  assert.deepEqual(held.actions, []);
});

test("releasing all tells the server once, and again nothing", () => {
  held.hold("key:w", ["w"]);
  held.hold("pad", ["l"]);
  clock.advance(50);
  held.releaseAll();
  held.releaseAll();
  held.release("pad");
  clock.advance(50);
  assert.deepEqual(sent.map(({ keys }) => keys.at(-1)), ["w", "wl", ""]);
});

test("held keys are sent again every 250 ms only when the server opted in, and never after the end", () => {
  held.hold("key:w", ["w"]);
  clock.advance(2000);
  assert.equal(sent.length, 1);
  sender.resend = true;
  clock.advance(1000);
  assert.equal(sent.length, 5);
  assert.ok(sent.every(({ keys }) => keys.join() === "w"));
  held.release("key:w");
  clock.advance(1000);
  assert.equal(sent.length, 6);
  held.hold("key:w", ["w"]);
  sender.stop();
  clock.advance(1000);
  assert.equal(sent.length, 7);
});

test("whatever is pressed and released in whatever order, the last thing said is the truth", () => {
  let seed = 7;
  const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
  for (let step = 0; step < 3000; step++) {
    const source = `s${random(4)}`;
    if (random(20) === 0) held.releaseAll();
    else held.hold(source, "wasdijkl".split("").filter(() => random(4) === 0));
    clock.advance(random(30));
  }
  clock.advance(100);
  assert.equal(sent.at(-1).keys.at(-1), held.actions.join(""));
  held.releaseAll();
  clock.advance(100);
  assert.equal(sent.at(-1).keys.at(-1), "");
  for (let i = 1; i < sent.length; i++) assert.ok(sent[i].at - sent[i - 1].at >= 16);
});

test("arrows look around, a rebound key is taken from where it was", () => {
  let bindings = defaultBindings();
  assert.equal(tokenFor(bindings, "KeyW"), "w");
  assert.equal(tokenFor(bindings, "ArrowLeft"), "j");
  bindings = rebind(bindings, "w", 1, "ArrowUp");
  assert.equal(tokenFor(bindings, "ArrowUp"), "w");
  assert.equal(tokenFor(bindings, "KeyW"), "w");
  assert.deepEqual(bindings.i, ["KeyI"]);
  bindings = rebind(bindings, "w", 0, "KeyZ");
  assert.equal(tokenFor(bindings, "KeyW"), null);
});

test("a stick within its dead zone is at rest, beyond it both directions count", () => {
  assert.deepEqual(stickTokens(0.3, -0.3, ...MOVE), []);
  assert.deepEqual(stickTokens(0.9, -0.9, ...MOVE), ["d", "w"]);
  assert.deepEqual(stickTokens(-0.5, 0.5, ...LOOK), ["j", "k"]);
});
