// Text of a model as a document fragment: nothing in it can run, load or style anything.

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
const LONGEST = 50_000; // characters that are worth a parse at every chunk
const MARKS = /[>*_[\]`~<#+-]/g;
const MOST_MARKS = 3000; // a parse takes the square of them at worst
const ESCAPED = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };

const escaped = (text) => text.replace(/[&<>]/g, (mark) => ESCAPED[mark]);
marked.use({
  renderer: {
    html: ({ text }) => escaped(text), // shown as it is
    image: ({ raw }) => escaped(raw), // nothing is loaded
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
  if (text.length > LONGEST || numMarks > MOST_MARKS) return document.createTextNode(text);
  try {
    return DOMPurify.sanitize(marked.parse(text, { breaks: true }), RULES);
  } catch {
    // Collapsed text nests deeper than the parser's stack, whose end shows in several kinds of errors.
    return document.createTextNode(text);
  }
}
