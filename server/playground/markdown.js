// Converts a model's text to a document fragment that can't run code, load resources or set styles.

import DOMPurify from "./vendor/dompurify/dist/purify.es.mjs";
import { marked } from "./vendor/marked/lib/marked.esm.js";

const TAGS =
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s strong sub sup table tbody td th thead tr ul";
const RULES = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "start"],
  ADD_URI_SAFE_ATTR: ["start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const MAX_LENGTH = 50_000; // characters; longer text is not parsed, because every chunk parses all of it
const MARKS = /[>*_[\]`~<#+-]/g;
const MAX_MARKS = 3000; // because the worst case of parsing is quadratic in them
const ESCAPED = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };

const escaped = (text) => text.replace(/[&<>]/g, (mark) => ESCAPED[mark]);
marked.use({
  renderer: {
    html: ({ text }) => escaped(text), // shown as text
    image: ({ raw }) => escaped(raw), // not loaded
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

export function markdown(text) {
  const numMarks = text.match(MARKS)?.length ?? 0;
  if (text.length > MAX_LENGTH || numMarks > MAX_MARKS) return document.createTextNode(text);
  try {
    return DOMPurify.sanitize(marked.parse(text, { breaks: true }), RULES);
  } catch {
    // Degenerate text may nest too deeply for the parser, which then raises one of several kinds of errors.
    return document.createTextNode(text);
  }
}
