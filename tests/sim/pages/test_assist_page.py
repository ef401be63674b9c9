"""The assist page: who may ask it, what wrong input is told, and a clinician's way through."""

import contextlib
import json
import socket
import stat
import threading
import urllib.error
import urllib.request

import pytest
from waiting import until

from common.data.icd import Diagnosis, DiagnosisIndex
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.support import SupportIndex
from sim.assist.server import PageState, address, cookie_name, make_server, open_socket
from sim.assist.suggest import ReferenceData, SuggestedDrug, Suggestion

TITLES = {
    "10:I509": "Heart failure, unspecified",
    "10:I10": "Essential (primary) hypertension",
    "9:4280": "Congestive heart failure, unspecified",
}
SECONDS = 60
"""Until a test fails that would otherwise hang."""
DRUGS = ("Furosemide", "Aspirin", "<b>Bold</b>")
REMARKS = {
    "<b>Bold</b>": ("in no order of the data", "never ordered for women (9 patients had it)")
}


class Stub:
    """Answers every patient with the same list."""

    def __init__(self):
        train = [
            Admission(
                patient=n,
                admission=n,
                sex="F",
                age=60,
                diagnosis_codes=("10:I509",),
                drugs=("Furosemide",) if n else ("Aspirin",),
            )
            for n in range(4)
        ]
        rows = [Diagnosis(code=code, title=title) for code, title in TITLES.items()]
        index = DiagnosisIndex(rows, frequency={}, origin="test titles")
        self.reference = ReferenceData(index=index, support=SupportIndex(train), note="A note.")
        self.asked, self.warnings = [], []

    def suggest(self, request):
        self.asked.append(request)
        supports = self.reference.support.support(request.codes, DRUGS)
        return Suggestion(
            drugs=tuple(
                SuggestedDrug(
                    name=name, support=support, confidence=sure, remarks=REMARKS.get(name, ())
                )
                for name, support, sure in zip(DRUGS, supports, (0.724, 0.5, None), strict=True)
            ),
            in_format=True,
            similar=4,
            dropped_diagnoses=0,
            seconds=0.1,
            ends="the model ended it",
            warnings=tuple(self.warnings),
        )


@pytest.fixture
def state(tmp_path):
    about = {"run": "run-1", "checkpoint": "round-0004", "backbone": "tiny", "source": "demo"}
    return PageState(suggester=Stub(), decisions=tmp_path / "d" / "decisions.jsonl", about=about)


@contextlib.contextmanager
def serving(state):
    """Serve the page in a thread; the second value stops it."""
    bound = open_socket(0)
    server = make_server(state, bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()

    def stop():
        server.should_exit = True
        thread.join(timeout=SECONDS)

    until(lambda: server.started or not thread.is_alive(), "the page is served")
    try:
        yield bound, stop
    finally:
        stop()


@pytest.fixture
def listening(state):
    with serving(state) as (bound, _):
        yield bound


@pytest.fixture
def ask(state, listening):
    """Send one request; headers of None are left out."""
    port = listening.getsockname()[1]

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments):
            return None

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay())

    def send(path, body=None, **headers):
        usual = {
            "Cookie": f"{cookie_name(port)}={state.secret}",
            "Content-Type": "application/json",
        }
        chosen = {**usual, **{k.replace("_", "-"): v for k, v in headers.items()}}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=data,
            headers={k: v for k, v in chosen.items() if v is not None},
        )
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    return send


FORM = {"sex": "F", "age": "71", "height": "", "weight": "", "diagnoses": ["10:I509"]}


def test_the_address_becomes_a_cookie_and_only_the_cookie_opens_the_page(state, listening, ask):
    path = "/" + address(state, listening).partition("/?")[2].join(["?", ""])
    status, headers, _ = ask(path, Cookie=None)
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    status, headers, text = ask("/")
    assert status == 200
    assert "not for clinical use" in text
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert state.secret not in text
    name, other = (cookie_name(listening.getsockname()[1] + more) for more in (0, 1))
    wrong = (None, f"{name}=wrong", f"{name}=", f"{name}=\xe9", f"{other}={state.secret}")
    for cookie in wrong:
        for target in ("/", "/api/diagnoses?q=heart"):
            assert ask(target, Cookie=cookie)[0] == 403
        assert ask("/api/suggest", FORM, Cookie=cookie)[0] == 403
    assert ask("/?token=wrong", Cookie=None)[0] == 403
    assert ask(f"/api/diagnoses?q=heart&token={state.secret}", Cookie=None)[0] == 403
    assert not state.suggester.asked


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "localhost.evil.example:PORT"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:PORT"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_pages_and_rebound_names_are_refused(state, listening, ask, headers):
    port = str(listening.getsockname()[1])
    headers = {name: value.replace("PORT", port) for name, value in headers.items()}
    assert ask("/api/suggest", FORM, **headers)[0] in (403, 415, 421)
    assert not state.suggester.asked
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin"}
    assert ask("/api/suggest", FORM, **own)[0] == 200


def test_it_listens_on_loopback_alone(listening):
    assert listening.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match="--port"):
        open_socket(listening.getsockname()[1])


def test_a_port_is_taken_before_the_model_is_loaded():
    with contextlib.closing(open_socket(0)) as first, pytest.raises(UserError, match="--port"):
        open_socket(first.getsockname()[1])


def test_no_documentation_pages_that_load_from_elsewhere(ask):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert ask(path)[0] == 404


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"[" * 60_000, b"\xff", b"x" * 70_000])
def test_nonsense_gets_a_message(ask, body):
    status, _, text = ask("/api/suggest", body or b" ")
    assert status == 422
    assert json.loads(text)["problems"]["form"]


@pytest.mark.parametrize("path", ["/api/suggest", "/api/decision"])
@pytest.mark.parametrize(
    "body", [b'["secret"]', b'{"sex": "secret', b'{"id": 7, "note": ["secret"], "age": "secret"}']
)
def test_what_was_typed_is_never_quoted(ask, path, body):
    """FastAPI's own answer to a wrong body quotes it."""
    status, _, text = ask(path, body)
    assert status == 422
    assert list(json.loads(text)) == ["problems"]
    assert "secret" not in text


def test_a_body_of_no_known_length_is_not_read(state, listening):
    port = listening.getsockname()[1]
    cookie = f"{cookie_name(port)}={state.secret}"
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sent:
        sent.sendall(
            f"POST /api/suggest HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        assert b" 422 " in sent.recv(100)
    assert not state.suggester.asked


def test_wrong_fields_come_back_by_name(ask):
    status, _, text = ask("/api/suggest", {**FORM, "age": "seventy", "height": "1.7"})
    assert status == 422
    assert set(json.loads(text)["problems"]) == {"age", "height"}


def decide(ask, identity, **changes):
    body = {"id": identity, "marks": ["keep", "remove", "keep"], "added": [], "note": ""}
    status, _, text = ask("/api/decision", {**body, **changes})
    return status, json.loads(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marks": ["keep", None, None]}, "2 of 3 drugs are undecided"),
        ({"marks": ["keep", "maybe", "keep"]}, "1 of 3 drugs are undecided"),
        ({"marks": ["keep"]}, "not about this list"),
        ({"marks": None}, "not about this list"),
        ({"added": ["x" * 201]}, "at most 200 characters"),
        ({"added": [" "]}, "at most 200 characters"),
        ({"added": "x"}, "can be added"),
        ({"note": "x" * 2001}, "note is longer"),
        ({"id": "0"}, "no longer known"),
        ({"id": None}, "no longer known"),
        ({"id": ["x"]}, "no longer known"),
    ],
)
def test_a_wrong_decision_is_refused_and_nothing_is_stored(state, ask, changes, message):
    identity = json.loads(ask("/api/suggest", FORM)[2])["id"]
    status, answer = decide(ask, identity, **changes)
    assert status == 422
    assert message in answer["problems"]["decision"]
    assert not state.decisions.exists()


def test_a_decision_is_stored_once_and_privately(state, ask):
    identity = json.loads(ask("/api/suggest", {**FORM, "age": 95})[2])["id"]
    assert decide(ask, identity, added=[" Digoxin  0.125 "], note=" ok ")[0] == 200
    assert decide(ask, identity)[0] == 422
    (line,) = state.decisions.read_text().splitlines()
    record = json.loads(line)
    assert record["kept"] == ["Furosemide", "<b>Bold</b>"]
    assert (record["removed"], record["added"]) == (["Aspirin"], ["Digoxin 0.125"])
    assert record["patient"]["age"] == "> 89"
    assert record["patient"]["diagnoses"] == [{"code": "10:I509", "title": TITLES["10:I509"]}]
    assert (record["run"], record["checkpoint"], record["note"]) == ("run-1", "round-0004", "ok")
    assert stat.S_IMODE(state.decisions.stat().st_mode) == 0o600


def test_text_that_utf8_cannot_hold_is_kept_escaped_and_counted(state, ask):
    half = "half \ud83d"
    identity = json.loads(ask("/api/suggest", {**FORM, "diagnoses": [half]})[2])["id"]
    assert state.suggester.asked[0].diagnoses[0].title == r"half \ud83d"
    status, answer = decide(ask, identity, added=[half], note=half)
    assert (status, answer["escaped_texts"]) == (200, 2)
    record = json.loads(state.decisions.read_bytes())
    assert (record["added"], record["note"]) == ([r"half \ud83d"], r"half \ud83d")
    assert record["escaped_texts"] == 2
    assert ask("/api/suggest", {half: half})[0] == 422


@pytest.mark.browser
def test_a_clinicians_way_through_the_page(browser, state, listening, requested_urls):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css):
        return browser.find_elements("css selector", css)

    def wait(condition):
        return WebDriverWait(browser, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    browser.get(address(state, listening))
    assert browser.current_url.endswith("/")
    assert "token" not in browser.current_url
    assert "not for clinical use" in browser.find_element("tag name", "body").text

    # Wrong input: each field says what would be right.
    browser.find_element("id", "height").send_keys("1.75")
    browser.find_element("id", "ask").click()
    wait(lambda: browser.find_element("id", "age-error").text)
    assert "175" in browser.find_element("id", "height-error").text
    assert "female or male" in browser.find_element("id", "sex-error").text
    assert "at least one" in browser.find_element("id", "diagnoses-error").text

    find('[value="F"]')[0].click()
    browser.find_element("id", "age").send_keys("71")
    browser.find_element("id", "height").clear()
    browser.find_element("id", "height").send_keys("165")
    browser.find_element("id", "weight").send_keys("80")
    assert "29.4" in browser.find_element("id", "bmi").text
    search = browser.find_element("id", "search")
    search.send_keys("heart fail")
    wait(lambda: len(find("#found li")) == 2)
    search.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    search.send_keys("i10")
    wait(lambda: len(find("#found li")) == 1)
    search.send_keys(Keys.ENTER)
    search.send_keys("lives alone", Keys.ENTER)
    assert [item.text for item in find("#chosen .code")] == ["I50.9", "I10", "free text"]
    find("#chosen li:nth-child(2) .icon")[0].click()
    find("#chosen li:nth-child(3) .icon")[1].click()
    browser.find_element("id", "ask").click()
    wait(lambda: len(find(".drug")) == 3)
    (asked,) = state.suggester.asked
    assert asked.codes == ("10:I10", "10:I509")
    assert (asked.sex, asked.age, asked.height_cm, asked.weight_kg) == ("F", 71, 165.0, 80.0)

    named = [name.text.split("\n") for name in find(".drug .name")]
    assert named == [[drug, *REMARKS.get(drug, ())] for drug in DRUGS]
    assert "72% confident · 3 of 4" in find(".support")[0].text
    assert "confident" not in find(".support")[2].text
    assert find("#ends")[0].text == "Why it ends there: the model ended it."
    assert "1 of 4" in find(".support")[1].text
    find('.drug [data-value="keep"]')[0].click()
    find('.drug [data-value="remove"]')[1].click()
    browser.find_element("id", "add").send_keys("aspirin", Keys.ENTER)
    assert "already" in browser.find_element("id", "decision-error").text
    browser.find_element("id", "add").clear()
    browser.find_element("id", "add").send_keys("Digoxin", Keys.ENTER)
    browser.find_element("id", "store").click()
    wait(lambda: "1 of 3" in browser.find_element("id", "decision-error").text)
    assert not state.decisions.exists()
    find('.drug [data-value="remove"]')[2].click()
    browser.find_element("id", "store").click()
    wait(lambda: "Stored" in browser.find_element("id", "stored").text)
    record = json.loads(state.decisions.read_text())
    assert record["kept"] == ["Furosemide"]
    assert record["removed"] == ["Aspirin", "<b>Bold</b>"]
    assert record["added"] == ["Digoxin"]

    own = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    outside = [url for url in requested_urls() if not url.startswith((own, "data:", "chrome:"))]
    assert outside == []
    violations = [e for e in browser.get_log("browser") if "Content Security" in e["message"]]
    assert violations == []


@pytest.mark.browser
def test_a_stopped_program_is_named_on_the_page(browser, state):
    from selenium.webdriver.support.ui import WebDriverWait

    with serving(state) as (bound, stop):
        browser.get(address(state, bound))
        stop()
        browser.find_element("id", "ask").click()
        problem = browser.find_element("id", "form-error")
        WebDriverWait(browser, SECONDS).until(lambda _: problem.text)
        assert "does not answer" in problem.text


@pytest.mark.browser
def test_what_must_be_known_before_reading_stands_above_the_list(browser, state, listening):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    state.suggester.warnings = ["Not recognised: <i>x</i>.", "Two diagnoses did not fit."]
    browser.get(address(state, listening))
    browser.find_element("css selector", '[value="M"]').click()
    browser.find_element("id", "age").send_keys("50")
    browser.find_element("id", "search").send_keys("lives alone", Keys.ENTER)
    browser.find_element("id", "ask").click()
    WebDriverWait(browser, SECONDS).until(lambda _: browser.find_elements("css selector", ".warn"))
    warnings = browser.find_elements("css selector", ".warn")
    assert [one.text for one in warnings] == state.suggester.warnings
    first = browser.find_element("css selector", ".drug")
    assert warnings[-1].location["y"] < first.location["y"]


@pytest.mark.browser
def test_a_field_s_message_is_in_view_beside_it_under_200_diagnoses(browser, state, listening):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address(state, listening))
    browser.set_window_size(1280, 800)
    browser.find_element("css selector", '[value="M"]').click()
    browser.find_element("id", "age").send_keys("50")
    browser.execute_script(
        """
        const search = document.getElementById("search");
        for (let number = 0; number < 200; number++) {
            search.value = "d" + number;
            search.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        }
        """
    )
    assert len(browser.find_elements("css selector", "#chosen li")) == 200
    button = browser.find_element("id", "ask")
    browser.execute_script("arguments[0].scrollIntoView()", button)
    button.click()
    message = browser.find_element("id", "diagnoses-error")
    WebDriverWait(browser, SECONDS).until(lambda _: message.text)
    assert message.text == "Diagnoses: at most 40."
    top, bottom, height = browser.execute_script(
        "const r = arguments[0].getBoundingClientRect(); return [r.top, r.bottom, innerHeight]",
        message,
    )
    assert 0 <= top < bottom <= height
    search = browser.find_element("id", "search")
    assert 0 < message.location["y"] - search.location["y"] < 90
    # A number's message is in its own column.
    browser.find_element("id", "weight").send_keys("3")
    browser.execute_script("arguments[0].click()", button)
    weight = browser.find_element("id", "weight-error")
    WebDriverWait(browser, SECONDS).until(lambda _: weight.text)
    assert abs(weight.location["x"] - browser.find_element("id", "weight").location["x"]) < 5
