(() => {
  const { sha256, shown } = JSON.parse(document.getElementById("packet").textContent);
  const MARKS = ["keep", "remove", "unsure"];
  const OVERALL = ["unusable", "poor", "fair", "good", "as I would order"];
  const STORE = `fedrx-review:${sha256}`;

  // One reviewer's work on this packet, kept under the name; `state` tells one start from another.
  const keyOf = (name) => `${STORE}:${name.toLowerCase()}`;

  const blank = (name) => ({
    packet: sha256, state: crypto.randomUUID(), reviewer: name, saved: "",
    cases: Object.fromEntries(shown.cases.map((c) => [c.id, {
      comment: "",
      lists: Object.fromEntries(c.lists.map((l) => [l.id, {
        marks: l.drugs.map(() => null), missing: [], overall: null,
      }])),
    }])),
  });

  const restored = (key) => {
    try {
      const kept = JSON.parse(localStorage.getItem(key));
      return kept && kept.packet === sha256 ? kept : null;
    } catch { return null; }
  };

  // Under STORE alone an earlier page kept its only reviewer.
  const knownKeys = () => {
    try {
      return Object.keys(localStorage).filter((key) => key === STORE || key.startsWith(`${STORE}:`)).sort();
    } catch { return []; }
  };

  let state = null;
  let place = 0;
  // Where a key acts, wherever the focus is: a list's letter, and a drug's number or the list's end.
  let at = { list: null, drug: 0 };

  const caseShown = () => shown.cases[place];
  const caseState = (c = caseShown()) => state.cases[c.id];

  const save = () => {
    state.saved = new Date().toISOString();
    try {
      localStorage.setItem(keyOf(state.reviewer), JSON.stringify(state));
      $("saved").textContent = `Saved in this browser at ${new Date().toTimeString().slice(0, 5)}`;
    } catch {
      $("saved").textContent = "This browser keeps nothing: download before you close the page";
    }
    counts();
  };

  const countOf = (c, of = state) => {
    const lists = Object.values(of.cases[c.id].lists);
    const all = lists.reduce((n, l) => n + l.marks.length, 0);
    return [lists.reduce((n, l) => n + l.marks.filter(Boolean).length, 0), all];
  };

  const counts = () => {
    let done = 0, all = 0;
    document.querySelectorAll("#cases li").forEach((item, i) => {
      const [marked, drugs] = countOf(shown.cases[i]);
      done += marked; all += drugs;
      item.className = marked === drugs ? "done" : "";
      item.querySelector(".count").textContent = marked === drugs ? "✓ done" : `${marked}/${drugs}`;
      item.firstChild.setAttribute("aria-current", i === place);
    });
    $("marked").textContent = `${done} of ${all} drugs marked`;
    $("progress").max = all || 1;
    $("progress").value = done;
    document.querySelectorAll(".list").forEach((card) => {
      const { marks } = caseState().lists[card.dataset.list];
      card.querySelector(".count").textContent = `${marks.filter(Boolean).length}/${marks.length} marked`;
    });
  };

  const say = (text) => { $("message").textContent = text; $("message").hidden = !text; };

  const setMark = (row, mark) => {
    caseState().lists[row.dataset.list].marks[Number(row.dataset.drug)] = mark;
    showMark(row, mark);
    save();
  };

  const showMark = (row, mark) => {
    row.dataset.mark = mark || "";
    row.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.value === mark));
  };

  const drugRow = (listId, drug, number) => {
    const buttons = MARKS.map((mark) => make("button", {
      type: "button", tabIndex: -1, textContent: mark[0].toUpperCase() + mark.slice(1), "data-value": mark,
    }));
    const row = make("li", {
      className: "drug", tabIndex: 0, "aria-label": `${drug}: keep, remove or unsure`,
      "data-list": listId, "data-drug": number,
    }, make("span", { className: "name", textContent: drug }), make("span", { className: "marks" }, ...buttons));
    row.addEventListener("focus", () => here(listId, number));
    buttons.forEach((b) => b.addEventListener("click", () => {
      setMark(row, row.dataset.mark === b.dataset.value ? null : b.dataset.value);
      row.focus();
    }));
    return row;
  };

  const listCard = (listed) => {
    const list = caseState().lists[listed.id];
    const rows = listed.drugs.map((drug, i) => drugRow(listed.id, drug, i));
    rows.forEach((row, i) => showMark(row, list.marks[i]));
    const chips = make("ul", { className: "chips" });
    const input = make("input", {
      className: "field missing", maxLength: 200, placeholder: "Name, then Enter", autocomplete: "off",
      "aria-label": `Missing drug for list ${listed.id}`,
    });
    const showChips = () => chips.replaceChildren(...list.missing.map((drug, i) => {
      const drop = make("button", { type: "button", textContent: "×", "aria-label": `Take ${drug} out` });
      drop.addEventListener("click", () => { list.missing.splice(i, 1); showChips(); save(); input.focus(); });
      return make("li", { className: "chip" }, drug, drop);
    }));
    const add = () => {
      const drug = input.value.trim().replace(/\s+/g, " ");
      const known = [...listed.drugs, ...list.missing].some((d) => d.toLowerCase() === drug.toLowerCase());
      say(drug && known ? `${drug} is in list ${listed.id} already.` : "");
      if (!drug || known) return;
      list.missing.push(drug);
      input.value = "";
      showChips();
      save();
    };
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") add(); });
    const addButton = make("button", { type: "button", className: "button", textContent: "Add" });
    addButton.addEventListener("click", add);
    const word = make("span", { className: "small soft" });
    const marks = OVERALL.map((_, i) => make("button", {
      type: "button", textContent: i + 1, "data-overall": i + 1, title: OVERALL[i],
      "aria-label": `Overall ${i + 1}: ${OVERALL[i]}`,
    }));
    const showOverall = () => {
      marks.forEach((b, i) => b.setAttribute("aria-pressed", list.overall === i + 1));
      word.textContent = list.overall ? OVERALL[list.overall - 1] : "1 unusable, 5 as I would order";
    };
    marks.forEach((b, i) => b.addEventListener("click", () => {
      list.overall = list.overall === i + 1 ? null : i + 1; showOverall(); save();
    }));
    showChips();
    showOverall();
    const card = make("section", { className: "card list", "data-list": listed.id, "aria-label": `List ${listed.id}` },
      make("header", {}, make("h3", { textContent: `List ${listed.id}` }), make("span", { className: "count small soft" })),
      rows.length ? make("ul", { className: "drugs" }, ...rows)
        : make("p", { className: "soft", textContent: "This list is empty." }),
      make("div", { className: "more" },
        make("div", {}, make("span", { className: "label", textContent: "Missing drugs" }),
          make("div", { className: "adding" }, input, addButton), chips),
        make("div", { className: "overall", tabIndex: -1 }, make("b", { textContent: "Overall" }),
          make("span", { className: "marks" }, ...marks), word)));
    card.querySelector(".more").addEventListener("focusin", () => here(listed.id, rows.length));
    return card;
  };

  const fact = (label, value, unit = "") =>
    make("li", {}, `${label} `, make("b", { textContent: value == null ? "unknown" : `${value}${unit}` }));

  const show = (number, focus = true) => {
    place = Math.max(0, Math.min(number, shown.cases.length - 1));
    const c = caseShown(), p = c.patient;
    say("");
    $("title").textContent = `Case ${place + 1} of ${shown.cases.length}`;
    const rounded = (value) => (value == null ? null : Math.round(value * 10) / 10);
    const sex = { F: "female", M: "male" }[p.sex] || p.sex;
    $("facts").replaceChildren(fact("Sex", sex), fact("Age", p.age), fact("Height", rounded(p.height_cm), " cm"),
      fact("Weight", rounded(p.weight_kg), " kg"), fact("BMI", rounded(p.bmi)));
    $("diagnoses").replaceChildren(...c.diagnoses.map((d) => make("li", { textContent: d })));
    $("lists").replaceChildren(...c.lists.map(listCard));
    if (!c.lists.length) $("lists").append(make("p", { className: "card", textContent: "No list in the format for this case." }));
    $("comment").value = caseState().comment;
    $("previous").disabled = place === 0;
    $("next").disabled = place === shown.cases.length - 1;
    counts();
    window.scrollTo(0, 0);
    here(c.lists[0]?.id, 0);
    if (focus) (spot() || $("title")).focus({ preventScroll: true });
  };

  const cardOf = (letter) => document.querySelector(`.list[data-list="${letter}"]`);

  const spot = () => {
    const card = cardOf(at.list);
    return card && (card.querySelectorAll(".drug")[at.drug] || card.querySelector(".overall"));
  };

  const here = (list, drug) => {
    at = { list, drug };
    document.querySelectorAll(".here").forEach((node) => node.classList.remove("here"));
    spot()?.classList.add("here");
  };

  const go = (list, drug) => {
    here(list, drug);
    spot()?.focus();
    spot()?.scrollIntoView({ block: "nearest" });
  };

  // Down the drugs of a list, to its overall mark, and on to the next list.
  const move = (step) => {
    const { lists } = caseShown();
    const number = lists.findIndex((l) => l.id === at.list);
    const drug = at.drug + step;
    if (drug >= 0 && drug <= lists[number].drugs.length) go(at.list, drug);
    else if (lists[number + step]) go(lists[number + step].id, step > 0 ? 0 : lists[number + step].drugs.length);
  };

  const moveList = (step) => {
    const { lists } = caseShown();
    const next = lists[lists.findIndex((l) => l.id === at.list) + step];
    if (next) go(next.id, 0);
  };

  const mark = (value) => {
    const row = spot();
    if (!row.matches(".drug")) {
      say(`List ${at.list} has no drug left to mark: 1 to 5 for all of it, ↑ back, → next list.`);
      return;
    }
    say("");
    setMark(row, value);
    if (value) move(1);
  };

  document.addEventListener("keydown", (event) => {
    if (!state || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, textarea")) {
      if (event.key === "Escape") (spot() || event.target.blur())?.focus?.();
      return;
    }
    const listed = {
      k: () => mark("keep"), r: () => mark("remove"), u: () => mark("unsure"),
      Backspace: () => { if (!spot().matches(".drug") && at.drug) move(-1); mark(null); },
      ArrowDown: () => move(1), ArrowUp: () => move(-1), ArrowRight: () => moveList(1), ArrowLeft: () => moveList(-1),
      m: () => cardOf(at.list).querySelector(".missing").focus(),
    };
    const anywhere = {
      n: () => { if (!$("next").disabled) show(place + 1); },
      p: () => { if (!$("previous").disabled) show(place - 1); },
    };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const act = anywhere[key] || (spot() && listed[key]);
    if (act) act();
    else if (/^[1-5]$/.test(key) && spot()) cardOf(at.list).querySelector(`[data-overall="${key}"]`).click();
    else return;
    event.preventDefault();
  });

  const hex = (buffer) => [...new Uint8Array(buffer)].map((b) => b.toString(16).padStart(2, "0")).join("");

  $("download").addEventListener("click", async () => {
    save();
    const body = JSON.stringify(state);
    const digest = hex(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(body)));
    const file = new Blob([JSON.stringify({ format: shown.format, sha256: digest, body }, null, 1)], { type: "application/json" });
    const link = make("a", { href: URL.createObjectURL(file) });
    const name = state.reviewer.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "reviewer";
    link.download = `fedrx-review-${sha256.slice(0, 8)}-${name}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
    const open = shown.cases.filter((c) => countOf(c)[0] < countOf(c)[1]).length;
    $("saved").textContent = open ? `Downloaded; ${open} case${open > 1 ? "s" : ""} not finished yet` : "Downloaded";
  });

  // Nobody works under a name that somebody else has chosen: who it is, is asked at every start.
  const working = (yes) => {
    document.querySelectorAll(".working").forEach((node) => { node.hidden = !yes; });
    $("who").hidden = yes;
  };

  const refuse = (text) => {
    $("who-message").textContent = text;
    $("who-message").hidden = !text;
    $("reviewer").setAttribute("aria-invalid", Boolean(text));
    $("reviewer").focus();
  };

  const begin = (of) => {
    state = of;
    $("name").textContent = state.reviewer;
    working(true);
    save();
    show(0);
  };

  const typed = () => $("reviewer").value.trim().replace(/\s+/g, " ");

  const start = () => {
    const name = typed();
    if (!name) refuse("Fill in your name or initials: reviews are told apart by it.");
    else if (restored(keyOf(name))) refuse(`${name} has marks here already: go on as ${name}, or take another name.`);
    else begin(blank(name));
  };

  const goOn = (key) => {
    const kept = restored(key);
    const name = kept.reviewer.trim().replace(/\s+/g, " ") || typed();
    if (!name) refuse("Fill in the name first that these marks are to have.");
    else {
      begin({ state: crypto.randomUUID(), ...kept, reviewer: name });
      if (key === STORE) localStorage.removeItem(STORE);
    }
  };

  const ask = () => {
    state = null;
    working(false);
    $("reviewer").value = "";
    $("known").replaceChildren(...knownKeys().filter(restored).map((key) => {
      const kept = restored(key);
      const [done, all] = shown.cases.map((c) => countOf(c, kept)).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      const button = make("button", {
        type: "button", className: "button",
        textContent: kept.reviewer ? `Go on as ${kept.reviewer}` : "Go on with marks without a name",
      });
      button.addEventListener("click", () => goOn(key));
      return make("li", {}, button, make("span", { className: "small soft", textContent: `${done} of ${all} drugs marked` }));
    }));
    refuse("");
  };

  $("start").addEventListener("click", start);
  $("reviewer").addEventListener("keydown", (event) => { if (event.key === "Enter") start(); });
  $("another").addEventListener("click", ask);
  $("comment").addEventListener("input", () => { caseState().comment = $("comment").value; save(); });
  $("previous").addEventListener("click", () => show(place - 1));
  $("next").addEventListener("click", () => show(place + 1));
  window.addEventListener("storage", (event) => {
    if (state && event.key === keyOf(state.reviewer)) { state = restored(event.key) || state; show(place, false); }
  });

  const SOURCES = {
    synthetic: "Synthetic patients.",
    demo: "Patients of the open MIMIC-IV demo.",
    credentialed: "Credentialed data: keep this file on approved machines, and share it with nobody outside the agreement.",
  };
  $("source").textContent = SOURCES[shown.source] || SOURCES.credentialed;
  document.querySelector("#cases ol").append(...shown.cases.map((_, i) => {
    const button = make("button", { type: "button" }, make("span", { textContent: `Case ${i + 1}` }), make("span", { className: "count" }));
    button.addEventListener("click", () => show(i));
    return make("li", {}, button);
  }));
  ask();
})();
