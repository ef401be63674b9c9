(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const FIELDS = ["sex", "age", "height", "weight", "diagnoses", "form", "decision"];
  let chosen = [];
  let found = [], at = -1, searches = 0;
  let list = null;

  const tell = (problems) => {
    for (const field of FIELDS) {
      $(`${field}-error`).textContent = problems[field] || "";
      const input = $(field === "diagnoses" ? "search" : field);
      if (input && input.matches("input")) input.setAttribute("aria-invalid", Boolean(problems[field]));
    }
    const first = FIELDS.find((field) => problems[field]);
    const target = { sex: document.querySelector("[name=sex]"), diagnoses: $("search") }[first] || (first && $(first));
    if (target && target.matches("input")) target.focus();
  };

  const post = async (path, body) => {
    try {
      const answer = await fetch(path, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      if (answer.ok) return await answer.json();
      if (answer.status === 422) return { problems: (await answer.json()).problems };
      return { problems: { form: (await answer.text()).slice(0, 200) || "The program failed; see the terminal." } };
    } catch {
      return { problems: { form: "fedrx assist does not answer: is it still running in the terminal?" } };
    }
  };

  const number = (id) => Number($(id).value.trim().replace(",", "."));
  const showBmi = () => {
    const [height, weight] = [number("height"), number("weight")];
    const known = height >= 100 && height <= 230 && weight >= 25 && weight <= 350;
    $("bmi").textContent = known ? `BMI ${(weight / (height / 100) ** 2).toFixed(1)} kg/m²` : "BMI: needs height and weight";
  };

  const showChosen = () => $("chosen").replaceChildren(...chosen.map((diagnosis, i) => {
    const up = make("button", { type: "button", className: "icon", textContent: "↑", disabled: i === 0, "aria-label": `Move ${diagnosis.title} up` });
    const drop = make("button", { type: "button", className: "icon", textContent: "×", "aria-label": `Take ${diagnosis.title} out` });
    up.addEventListener("click", () => { chosen.splice(i - 1, 0, chosen.splice(i, 1)[0]); showChosen(); });
    drop.addEventListener("click", () => { chosen.splice(i, 1); showChosen(); $("search").focus(); });
    return make("li", {},
      make("span", { className: diagnosis.label ? "code" : "code free", textContent: diagnosis.label || "free text" }),
      make("span", { className: "title", textContent: diagnosis.title }), up, drop);
  }));

  const choose = (diagnosis) => {
    if (!chosen.some((d) => d.title.toLowerCase() === diagnosis.title.toLowerCase())) chosen.push(diagnosis);
    $("search").value = "";
    $("diagnoses-error").textContent = "";
    $("search").setAttribute("aria-invalid", "false");
    close();
    showChosen();
  };

  const close = () => {
    searches += 1;
    found = []; at = -1;
    $("found").hidden = true;
    $("search").setAttribute("aria-expanded", "false");
    $("search").removeAttribute("aria-activedescendant");
  };

  const mark = (i) => {
    at = i;
    [...$("found").children].forEach((item, j) => item.setAttribute("aria-selected", j === at));
    if (at >= 0) {
      $("search").setAttribute("aria-activedescendant", `found-${at}`);
      $("found").children[at].scrollIntoView({ block: "nearest" });
    } else $("search").removeAttribute("aria-activedescendant");
  };

  const search = async () => {
    const text = $("search").value.trim();
    const mine = (searches += 1);
    if (text.length < 2) { close(); return; }
    let answer = [];
    try { answer = await (await fetch(`/api/diagnoses?q=${encodeURIComponent(text)}`)).json(); } catch { return; }
    if (mine !== searches) return;
    found = answer;
    $("found").replaceChildren(...found.map((d, i) => {
      const item = make("li", { id: `found-${i}`, role: "option" },
        make("span", { className: "code", textContent: d.label }), make("span", { textContent: d.title }));
      item.addEventListener("mousedown", (event) => { event.preventDefault(); choose(d); });
      return item;
    }));
    $("found").hidden = !found.length;
    $("search").setAttribute("aria-expanded", Boolean(found.length));
    mark(-1);
  };

  $("search").addEventListener("input", search);
  $("search").addEventListener("blur", close);
  $("search").addEventListener("keydown", (event) => {
    const text = $("search").value.trim().replace(/\s+/g, " ");
    if (event.key === "ArrowDown" && found.length) mark((at + 1) % found.length);
    else if (event.key === "ArrowUp" && found.length) mark((at - 1 + found.length) % found.length);
    else if (event.key === "Escape") close();
    else if (event.key === "Enter" && at >= 0) choose(found[at]);
    else if (event.key === "Enter" && text) {
      const same = found.find((d) => [d.title.toLowerCase(), d.label.toLowerCase(), d.label.replace(".", "").toLowerCase()].includes(text.toLowerCase()));
      choose(same || { code: "", label: "", title: text });
    } else if (event.key !== "Enter") return;
    event.preventDefault();
  });

  const drugRow = (drug, i) => {
    const buttons = ["keep", "remove"].map((value) => make("button", {
      type: "button", textContent: value === "keep" ? "Keep" : "Remove", "data-value": value, "aria-label": `${value} ${drug.name}`, "aria-pressed": "false",
    }));
    const known = drug.similar > 0;
    const bar = make("i");
    bar.style.width = known ? `${Math.round((100 * drug.ordered) / drug.similar)}%` : "0";
    const sure = typeof drug.confidence === "number" ? `${Math.round(100 * drug.confidence)}% confident · ` : "";
    const support = make("span", { className: "support small soft" },
      sure + (known ? `${drug.ordered} of ${drug.similar} similar stays` : about.supported ? "no similar stays" : "no data at hand"), make("span", { className: "bar" }, bar));
    const row = make("li", { className: "drug", "data-mark": "" },
      make("span", { className: "name" }, drug.name, ...drug.remarks.map((text) => make("span", { className: "remark", textContent: text }))),
      support, make("span", { className: "marks" }, ...buttons));
    if (drug.remarks.length) row.dataset.doubt = "";
    buttons.forEach((button) => button.addEventListener("click", () => {
      list.marks[i] = button.dataset.value;
      row.dataset.mark = list.marks[i];
      buttons.forEach((b) => b.setAttribute("aria-pressed", b === button));
      count();
    }));
    return row;
  };

  const addedRow = (name, i) => {
    const drop = make("button", { type: "button", className: "icon", textContent: "×", "aria-label": `Take ${name} out` });
    drop.addEventListener("click", () => { list.added.splice(i, 1); showAdded(); });
    return make("li", { className: "drug added" }, make("span", { className: "name", textContent: name }),
      make("span", { className: "tag", textContent: "added by you" }), drop);
  };

  const showAdded = () => {
    document.querySelectorAll(".added").forEach((row) => row.remove());
    $("drugs").append(...list.added.map(addedRow));
    count();
  };

  const count = () => {
    const open = list.marks.filter((m) => !m).length;
    $("decided").textContent = list.marks.length ? (open ? `${open} of ${list.marks.length} to decide` : "all decided") : "";
    $("stored").textContent = "";
    $("decision-error").textContent = "";
  };

  const add = () => {
    const name = $("add").value.trim().replace(/\s+/g, " ");
    const known = [...list.drugs.map((d) => d.name), ...list.added].some((d) => d.toLowerCase() === name.toLowerCase());
    if (!name) return;
    if (known) { $("decision-error").textContent = `${name} is in the list already.`; return; }
    list.added.push(name);
    $("add").value = "";
    showAdded();
  };

  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    tell({});
    $("ask").disabled = true;
    $("ask").textContent = "Asking the model…";
    const answer = await post("/api/suggest", {
      sex: document.querySelector("[name=sex]:checked")?.value || "",
      age: $("age").value, height: $("height").value, weight: $("weight").value,
      diagnoses: chosen.map((d) => d.code || d.title),
    });
    $("ask").disabled = false;
    $("ask").textContent = "Suggest drugs";
    if (answer.problems) { tell(answer.problems); return; }
    list = { ...answer, marks: answer.drugs.map(() => null), added: [] };
    $("empty").hidden = true;
    $("result").hidden = false;
    $("heading").textContent = `${list.drugs.length} suggested drug${list.drugs.length === 1 ? "" : "s"}`;
    $("ends").textContent = list.drugs.length && list.ends ? `Why it ends there: ${list.ends}.` : "";
    $("warnings").replaceChildren(...list.warnings.map((text) => make("p", { className: "warn", textContent: text })));
    $("drugs").replaceChildren(...list.drugs.map(drugRow));
    $("note").value = "";
    $("store").disabled = false;
    count();
    $("heading").focus();
  });

  $("store").addEventListener("click", async () => {
    const answer = await post("/api/decision", { id: list.id, marks: list.marks, added: list.added, note: $("note").value });
    if (answer.problems) {
      $("decision-error").textContent = answer.problems.decision || answer.problems.form;
      document.querySelector('.drug[data-mark=""] button')?.focus();
      return;
    }
    count();
    $("stored").textContent = "✓ Stored on this machine";
    $("store").disabled = true;
  });

  $("add").addEventListener("keydown", (event) => { if (event.key === "Enter") add(); });
  $("add-button").addEventListener("click", add);
  for (const id of ["age", "height", "weight"]) $(id).addEventListener("input", () => {
    $(`${id}-error`).textContent = "";
    $(id).setAttribute("aria-invalid", "false");
  });
  $("sex").addEventListener("change", () => { $("sex-error").textContent = ""; });
  $("height").addEventListener("input", showBmi);
  $("weight").addEventListener("input", showBmi);
  $("run").textContent = `${about.run} · ${about.backbone} · ${about.source} data`;
  $("titles").textContent = `Searches ${about.titles}.`;
  $("support").textContent = about.support;
  $("where").textContent = `Decisions are stored in ${about.decisions}, readable by you alone. Nothing leaves this machine.`;
  $("age").focus();
})();
