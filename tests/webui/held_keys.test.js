import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { defaultBindings, rebind, stickActions, actionFor, LOOK, MOVE } from "../../webui/js/bindings.js";
import { HeldKeys, TransitionSender } from "../../webui/js/held_keys.js";
import { FakeClock } from "./helpers.js";

let clock, sent, sender, held;

beforeEach(() => {
  clock = new FakeClock();
  sent = [];
  sender = new TransitionSender((transitions) => sent.push({ at: clock.time, keys: transitions.map(({ actions }) => actions.join("")) }), clock);
  held = new HeldKeys((actions) => sender.change(actions));
});

test("the first transition is sent at once, those within 16 ms are sent together and in order", () => {
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

test("an action stays held until its last source releases it", () => {
  held.hold("key:KeyW", ["w"]);
  held.hold("stick", ["w", "d"]);
  held.release("key:KeyW");
  assert.deepEqual(held.actions, ["w", "d"]);
  held.release("stick");
  assert.deepEqual(held.actions, []);
});

test("releasing all tells the server once", () => {
  held.hold("key:w", ["w"]);
  held.hold("pad", ["l"]);
  clock.advance(50);
  held.releaseAll();
  held.releaseAll();
  held.release("pad");
  clock.advance(50);
  assert.deepEqual(sent.map(({ keys }) => keys.at(-1)), ["w", "wl", ""]);
});

test("held keys are resent every 250 ms only if the server asks for it, and never after the end", () => {
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

test("after any sequence of presses and releases, the last message holds the held actions", () => {
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

test("arrows look around, a rebound key is removed from its old action", () => {
  let bindings = defaultBindings();
  assert.equal(actionFor(bindings, "KeyW"), "w");
  assert.equal(actionFor(bindings, "ArrowLeft"), "j");
  bindings = rebind(bindings, "w", 1, "ArrowUp");
  assert.equal(actionFor(bindings, "ArrowUp"), "w");
  assert.equal(actionFor(bindings, "KeyW"), "w");
  assert.deepEqual(bindings.i, ["KeyI"]);
  bindings = rebind(bindings, "w", 0, "KeyZ");
  assert.equal(actionFor(bindings, "KeyW"), null);
});

test("a stick in its dead zone holds nothing, beyond it both directions count", () => {
  assert.deepEqual(stickActions(0.3, -0.3, ...MOVE), []);
  assert.deepEqual(stickActions(0.9, -0.9, ...MOVE), ["d", "w"]);
  assert.deepEqual(stickActions(-0.5, 0.5, ...LOOK), ["j", "k"]);
});
