// Key bindings. Codes name positions (KeyW), so WASD has the same shape on every keyboard layout.

export const ACTIONS = [
  { action: "w", label: "Walk forward", icon: "W", keys: ["KeyW"] },
  { action: "s", label: "Walk back", icon: "S", keys: ["KeyS"] },
  { action: "a", label: "Step left", icon: "A", keys: ["KeyA"] },
  { action: "d", label: "Step right", icon: "D", keys: ["KeyD"] },
  { action: "i", label: "Look up", icon: "I", keys: ["KeyI", "ArrowUp"] },
  { action: "k", label: "Look down", icon: "K", keys: ["KeyK", "ArrowDown"] },
  { action: "j", label: "Look left", icon: "J", keys: ["KeyJ", "ArrowLeft"] },
  { action: "l", label: "Look right", icon: "L", keys: ["KeyL", "ArrowRight"] },
];

export const defaultBindings = () => Object.fromEntries(ACTIONS.map(({ action, keys }) => [action, [...keys]]));

/** The bindings that the user chose, kept in `store`, or the defaults. */
export const chosenBindings = (store) => store.get("bindings", null) ?? defaultBindings();

/** The action bound to a key code, or null. */
export function actionFor(bindings, code) {
  return ACTIONS.find(({ action }) => bindings[action]?.includes(code))?.action ?? null;
}

/** New bindings with `code` in slot `slot` of `action`. The action that had it loses it. */
export function rebind(bindings, action, slot, code) {
  const next = {};
  for (const { action: name } of ACTIONS) next[name] = (bindings[name] ?? []).filter((existing) => existing !== code);
  next[action] = [...next[action]];
  if (slot < next[action].length) next[action][slot] = code;
  else next[action].push(code);
  return next;
}

const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Space: "Space" };

export const keyName = (code) => NAMES[code] ?? code.replace(/^(Key|Digit)/, "").replace(/^Numpad/, "Num ");

/** A stick's deflection, -1..1 with y down, as actions. `horizontal` and `vertical` are [negative, positive]. */
export function stickActions(x, y, horizontal, vertical, deadZone = 0.35) {
  const actions = [];
  if (Math.abs(x) > deadZone) actions.push(horizontal[x > 0 ? 1 : 0]);
  if (Math.abs(y) > deadZone) actions.push(vertical[y > 0 ? 1 : 0]);
  return actions;
}

export const MOVE = [["a", "d"], ["w", "s"]];
export const LOOK = [["j", "l"], ["i", "k"]];

const DPAD = [[12, "w"], [13, "s"], [14, "a"], [15, "d"]]; // button numbers of the standard gamepad

/** The pressed buttons of a gamepad's d-pad as actions. */
export const dpadActions = (buttons) =>
  DPAD.filter(([button]) => buttons[button]?.pressed).map(([, action]) => action);
