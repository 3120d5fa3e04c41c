// Which key does what. Codes are places on the keyboard (KeyW), so WASD stays a cross on every layout.

export const ACTIONS = [
  { token: "w", label: "Walk forward", icon: "W", keys: ["KeyW"] },
  { token: "s", label: "Walk back", icon: "S", keys: ["KeyS"] },
  { token: "a", label: "Step left", icon: "A", keys: ["KeyA"] },
  { token: "d", label: "Step right", icon: "D", keys: ["KeyD"] },
  { token: "i", label: "Look up", icon: "I", keys: ["KeyI", "ArrowUp"] },
  { token: "k", label: "Look down", icon: "K", keys: ["KeyK", "ArrowDown"] },
  { token: "j", label: "Look left", icon: "J", keys: ["KeyJ", "ArrowLeft"] },
  { token: "l", label: "Look right", icon: "L", keys: ["KeyL", "ArrowRight"] },
];

export const defaultBindings = () => Object.fromEntries(ACTIONS.map(({ token, keys }) => [token, [...keys]]));

/** Key code -> token. */
export function tokenFor(bindings, code) {
  return ACTIONS.find(({ token }) => bindings[token]?.includes(code))?.token ?? null;
}

/** New bindings with `code` at place `slot` of `token`; it is taken away from whatever had it. */
export function rebind(bindings, token, slot, code) {
  const next = {};
  for (const { token: name } of ACTIONS) next[name] = (bindings[name] ?? []).filter((existing) => existing !== code);
  next[token] = [...next[token]];
  if (slot < next[token].length) next[token][slot] = code;
  else next[token].push(code);
  return next;
}

const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Space: "Space" };

export const keyName = (code) => NAMES[code] ?? code.replace(/^(Key|Digit)/, "").replace(/^Numpad/, "Num ");

/** A stick's deflection, -1..1 with y down, as tokens. `horizontal` and `vertical` are [negative, positive]. */
export function stickTokens(x, y, horizontal, vertical, deadZone = 0.35) {
  const tokens = [];
  if (Math.abs(x) > deadZone) tokens.push(horizontal[x > 0 ? 1 : 0]);
  if (Math.abs(y) > deadZone) tokens.push(vertical[y > 0 ? 1 : 0]);
  return tokens;
}

export const MOVE = [["a", "d"], ["w", "s"]];
export const LOOK = [["j", "l"], ["i", "k"]];
