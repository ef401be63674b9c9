"""A clinician's way through the packet in a real browser: keys, mouse, reload, download, import."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from answering import answering
from waiting import until

from common.errors import UserError
from sim.answers.review import import_reviews, make_review


@pytest.fixture
def listener():
    """A server that must never be asked."""
    asked = []

    with answering(lambda path, _: asked.append(path) or b"") as address:
        yield f"{address}/", asked


def rows(browser):
    return browser.find_elements("css selector", ".drug")


def marks(browser):
    return [
        (row.find_element("css selector", ".name").text, row.get_attribute("data-mark"))
        for row in rows(browser)
    ]


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def start(browser, name):
    """Say at the start who reviews."""
    field = browser.find_element("id", "reviewer")
    field.clear()
    field.send_keys(name)
    browser.find_element("id", "start").click()


def go_on(browser, name):
    for button in browser.find_elements("css selector", "#known button"):
        if button.text == f"Go on as {name}":
            button.click()
            return
    raise AssertionError(f"{name} is not known")


def downloaded(folder):
    return until(lambda: next(folder.glob("*.json"), None), "nothing was downloaded")


@pytest.mark.browser
def test_mark_reload_download_import(browser, run, tmp_path, requested_urls):
    from selenium.webdriver.common.keys import Keys

    page = make_review(run)
    browser.get(page.as_uri())
    assert "not for clinical use" in browser.find_element("tag name", "body").text

    if folder := os.environ.get("FEDRX_PICTURES"):
        browser.save_screenshot(f"{folder}/review-start.png")

    # Before anything is shown, the page asks who reviews; without a name it says what is missing.
    assert not browser.find_element("id", "lists").is_displayed()
    browser.find_element("id", "start").click()
    assert "name or initials" in browser.find_element("id", "who-message").text
    start(browser, "  Dr. Å   B ")
    assert browser.find_element("id", "title").text == "Case 1 of 3"

    # Keyboard: list A has two drugs, list B one; the page starts on the first.
    names = [name for name, _ in marks(browser)]
    assert names == ["Aspirin", "Furosemide", "Docusate"]
    press(browser, "k", "r", "4", "m")
    press(browser, *"Lisinopril", Keys.ENTER, Keys.ESCAPE)
    assert browser.find_element("css selector", ".chip").text.startswith("Lisinopril")
    rows(browser)[1].send_keys(Keys.ARROW_RIGHT)
    press(browser, "k", Keys.BACKSPACE, "u", "5")
    marked = ["keep", "remove", "unsure"]
    assert [mark for _, mark in marks(browser)] == marked

    # Mouse on case 2.
    press(browser, "n")
    assert browser.find_element("id", "title").text == "Case 2 of 3"
    for row in rows(browser):
        row.find_element("css selector", '[data-value="remove"]').click()
    rows(browser)[0].find_element("css selector", '[data-value="keep"]').click()
    browser.find_elements("css selector", '[data-overall="2"]')[1].click()
    browser.find_element("id", "comment").send_keys("Dose?")

    browser.refresh()
    go_on(browser, "Dr. Å B")
    assert browser.find_element("id", "name").text == "Dr. Å B"
    assert [name for name, _ in marks(browser)] == names
    assert [mark for _, mark in marks(browser)] == marked
    assert browser.find_element("css selector", ".chip").text.startswith("Lisinopril")
    overall = [
        browser.find_element("css selector", f'[data-list="{name}"] [data-overall="{mark}"]')
        for name, mark in (("A", 4), ("B", 5))
    ]
    assert [button.get_attribute("aria-pressed") for button in overall] == ["true", "true"]
    browser.find_element("css selector", "#cases li:nth-child(2) button").click()
    assert [mark for _, mark in marks(browser)] == ["keep", "remove", "remove", "remove"]
    assert browser.find_element("id", "comment").get_attribute("value") == "Dose?"

    browser.find_element("id", "download").click()
    file = downloaded(tmp_path / "downloads")
    result = import_reviews(run, [file]).as_json()
    assert result["reviewers"] == ["Dr. Å B"]
    fedrx, popularity = result["models"]["fedrx"], result["models"]["popularity"]
    assert fedrx["drugs"] == {"keep": 1, "remove": 3, "unsure": 0, "unmarked": 0}
    assert popularity["drugs"] == {"keep": 1, "remove": 1, "unsure": 1, "unmarked": 1}
    assert (fedrx["overall"], popularity["overall"]) == ((4 + 2) / 2, 5)
    assert (fedrx["added"], popularity["added"]) == (1, 0)
    assert fedrx["format_followed"] == pytest.approx(2 / 3)
    assert fedrx["kept_share"] == pytest.approx((1 / 2 + 0 / 2) / 2)
    # Against {Furosemide, Lisinopril}, {Insulin} and {Warfarin}: before, and after the review.
    assert fedrx["similarity"]["jaccard"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert fedrx["similarity_after_review"]["jaccard"] == pytest.approx((1 / 3 + 0) / 2)
    assert run.read_json("summary.json")["review"] == result

    # chrome: and data: are of the empty page that the browser starts with.
    urls = requested_urls()
    assert {url.split(":")[0] for url in urls} <= {"file", "blob", "chrome", "data"}
    assert page.as_uri() in urls
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


@pytest.mark.browser
def test_nothing_in_the_page_runs_or_reaches_the_network(browser, run, listener, requested_urls):
    """Markup in names stays text, and even a script inside the page gets nothing out."""
    url, asked = listener
    browser.get(make_review(run).as_uri())
    start(browser, "One")
    assert "<img src=x onerror=alert(1)>" in browser.find_element("id", "diagnoses").text
    browser.find_element("css selector", "#cases li:nth-child(2) button").click()
    assert "</script><script>alert(2)</script>" in [name for name, _ in marks(browser)]
    outcome = browser.execute_async_script(
        """
        const [url, done] = arguments;
        const image = new Image();
        image.src = url + "image";
        const link = document.createElement("link");
        link.rel = "stylesheet";
        link.href = url + "style";
        document.head.append(link);
        for (const tag of ["iframe", "video", "embed"]) {
            const part = document.createElement(tag);
            part.src = url + tag;
            document.body.append(part);
        }
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.head.append(script);
        try { navigator.sendBeacon(url + "beacon", "x"); } catch {}
        fetch(url + "fetch").then(() => "sent", () => "refused")
            .then((r) => setTimeout(() => done([r, Boolean(window.ran)]), 500));
        """,
        url,
    )
    assert outcome == ["refused", False]
    assert asked == []
    refused = [e["message"] for e in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 7


@pytest.mark.browser
def test_a_second_person_in_the_same_browser_begins_anew(browser, run, tmp_path):
    page = make_review(run)
    browser.get(page.as_uri())
    start(browser, "Anna")
    press(browser, "k", "r", "4", "n", "u")
    browser.find_element("id", "download").click()
    first = downloaded(tmp_path / "downloads")
    first = first.rename(tmp_path / "anna.json")

    browser.find_element("id", "another").click()
    assert not browser.find_element("id", "lists").is_displayed()
    press(browser, "r")  # no key acts on the first person's marks meanwhile
    start(browser, "ANNA")
    assert "ANNA has marks here already" in browser.find_element("id", "who-message").text
    start(browser, "Bert")
    assert browser.find_element("id", "name").text == "Bert"
    assert browser.find_element("id", "title").text == "Case 1 of 3"
    assert {mark for _, mark in marks(browser)} == {""}
    press(browser, "r", "r", "k", "2")
    browser.find_element("id", "download").click()
    second = downloaded(tmp_path / "downloads")

    browser.refresh()
    known = [b.text for b in browser.find_elements("css selector", "#known button")]
    assert known == ["Go on as Anna", "Go on as Bert"]
    go_on(browser, "Anna")
    assert [mark for _, mark in marks(browser)] == ["keep", "remove", ""]
    result = import_reviews(run, [first, second]).as_json()
    assert result["reviewers"] == ["Anna", "Bert"]
    assert result["agreement"]["unanimous"] == 1 / 2  # A: keep, remove; B: remove, remove

    # The same marks from another start, and other marks from the same start: both are one person's.
    content = json.loads(second.read_text())
    body = json.loads(content["body"])
    changed = {number: {**case, "comment": "mine"} for number, case in body["cases"].items()}
    for name, twin in (("Carl", {"state": "another"}), ("Dora", {"cases": changed})):
        text = json.dumps({**body, "reviewer": name, **twin})
        file = tmp_path / f"{name}.json"
        digest = hashlib.sha256(text.encode()).hexdigest()
        file.write_text(json.dumps({**content, "body": text, "sha256": digest}))
        with pytest.raises(UserError, match=rf"reviews of Bert and {name} are one person's"):
            import_reviews(run, [file])
    assert run.read_json("summary.json")["review"] == result


@pytest.mark.browser
def test_keys_act_where_the_reviewer_is(browser, run):
    """Also without a focus, and never on a drug that was marked before the list's end."""
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(1280, 800)
    browser.get(make_review(run).as_uri())
    start(browser, "One")

    def shown():
        return [mark for _, mark in marks(browser)]

    press(browser, "k", "k", "r", "r")
    assert shown() == ["keep", "keep", ""]
    assert "no drug left" in browser.find_element("id", "message").text
    press(browser, "3")
    chosen = browser.find_element("css selector", '[data-list="A"] [data-overall="3"]')
    assert chosen.get_attribute("aria-pressed") == "true"
    press(browser, Keys.ARROW_UP, "u")
    assert shown() == ["keep", "unsure", ""]
    press(browser, Keys.ARROW_DOWN)
    browser.find_element("id", "title").click()
    browser.execute_script("document.activeElement.blur()")
    press(browser, "r")
    assert shown() == ["keep", "unsure", "remove"]
    browser.find_element("id", "another").send_keys("p")
    press(browser, Keys.BACKSPACE)
    assert shown() == ["keep", "unsure", ""]
    press(browser, "n")
    browser.execute_script("document.activeElement.blur()")
    press(browser, "k")
    assert shown()[0] == "keep"


WORDS_BROKEN = """
return [...document.querySelectorAll('.drug .name')].flatMap((node) => {
  const text = node.firstChild;
  return [...text.data.matchAll(/[^ -]+/g)].filter((word) => {
    const range = document.createRange();
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    return new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1;
  }).map((word) => word[0]);
});
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_legend_is_in_sight_and_names_break_between_words(browser, run, width):
    lines = run.lines("predictions.jsonl")
    lines[0]["answer"] = [
        "Hydrochlorothiazide Losartan Potassium Tablet",
        "Piperacillin-Tazobactam 4.5 g",
    ]
    (run.path / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(make_review(run).as_uri())
    start(browser, "One")
    for height in (0, 10_000):
        browser.execute_script(f"window.scrollTo(0, {height})")
        place = browser.execute_script(
            "const r = document.querySelector('.keys').getBoundingClientRect();"
            "return [r.top, r.bottom, innerHeight]"
        )
        assert 0 <= place[0] < place[1] <= place[2]
        assert place[1] - place[0] < 60  # of 800: it leaves the screen to the list
    assert browser.execute_script(WORDS_BROKEN) == []
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(wide)
    if folder := os.environ.get("FEDRX_PICTURES"):
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(f"{folder}/review-{width}.png")


def test_the_page_is_one_file_without_addresses(run):
    text = make_review(run).read_text(encoding="utf-8")
    for trace in ("http:", "https:", "//cdn", "@import", "url(", 'src="'):
        assert trace not in text.split('id="packet"')[0] + text.split("</script>", 1)[1]


def test_the_page_is_blind(run):
    page = make_review(run, include_ordered=True)
    text = page.read_text(encoding="utf-8")
    for secret in ('fedrx"', "popularity", 'ordered"', "case-1", "patient-secret", "text-secret"):
        assert secret not in text
    shown = json.loads((page.parent / "packet.json").read_text())
    assert "truth" not in json.dumps(shown)
    assert Path(page).stat().st_mode & 0o777 == 0o600
