// The theme puts wide tables into scrolling frames; with a keyboard they can be scrolled only if they take the focus.
function reachable() {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) frame.tabIndex = 0;
}
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
reachable();
