// Keys: one table that handles them and that the help shows.

import { byId, create } from "./dom.js";

const TEXT_FIELDS = 'input[type="search"], input[type="text"], select, textarea';

/**
 * Handle the keys of a table: groups of [keys, description, page, action]. `page()` returns the page that is shown.
 * `others`: actions of single images by their key, which the help does not list.
 */
export function connectKeys(groups, page, others) {
  const actions = new Map([...others].map(([key, action]) => [`single ${key}`, action]));
  for (const [, entries] of groups) {
    for (const [keys, , scope, action] of entries) {
      if (action !== null) for (const key of keys) actions.set(`${scope} ${key}`, action);
    }
  }
  document.addEventListener("keydown", (event) => {
    const name = keyName(event);
    const action = actions.get(`${page()} ${name}`) ?? actions.get(`any ${name}`);
    if (action === undefined || document.querySelector("dialog[open]") !== null || isUsedByControl(event)) return;
    event.preventDefault();
    action(event);
  });
  showHelp(groups);
}

/** Return the name of a key with its modifiers, such as "Ctrl+Shift+z". Shift is not named for characters like "?". */
function keyName(event) {
  const key = event.key === " " ? "Space" : event.key;
  const isLetter = /^[a-z]$/i.test(key);
  const modifiers = [
    (event.ctrlKey || event.metaKey) && "Ctrl+",
    event.altKey && "Alt+",
    event.shiftKey && (isLetter || key.length > 1) && "Shift+",
  ];
  return modifiers.filter(Boolean).join("") + (isLetter ? key.toLowerCase() : key);
}

/** Return whether the control with the focus uses a key itself. */
function isUsedByControl({ target, key }) {
  if (target.matches(TEXT_FIELDS)) return key !== "Escape";
  if (target.matches("button, summary, input")) {
    const isRange = target.matches('input[type="range"], input[type="radio"]');
    return key === "Enter" || key === " " || (isRange && /^(Arrow|Home|End|Page)/.test(key));
  }
  return false;
}

function showHelp(groups) {
  for (const [title, entries] of groups) {
    const list = create("dl");
    for (const [keys, description] of entries) {
      const names = keys.flatMap((key, at) => [at > 0 ? " " : "", create("kbd", {}, printable(key))]);
      list.append(create("dt", {}, ...names), create("dd", {}, description));
    }
    byId("help-keys").append(create("section", {}, create("h3", {}, title), list));
  }
}

function printable(key) {
  const names = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc" };
  const parts = key === "+" ? ["+"] : key.split("+");
  return parts.map((part) => names[part] ?? (/^[a-z]$/.test(part) ? part.toUpperCase() : part)).join(" + ");
}
