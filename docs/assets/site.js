// The theme puts wide tables into scrolling frames; with a keyboard they can be scrolled only if they take the focus.
function reachable() {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) frame.tabIndex = 0;
}
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
reachable();

// From the disk the theme's search cannot start, and on a phone its button would stay.
if (location.protocol === "file:") document.documentElement.classList.add("from-disk");
document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search");
