"""The page itself: what the server answers, and a visit by a real browser. `make test-ui` installs what it needs."""

import json
import shutil
import threading
import urllib.error
import urllib.request

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (pip install 'draftdiff[ui]')")

from draftdiff.cli import memory
from draftdiff.ui import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def address(sessions):
    """Of a server over the tiny pipelines."""
    ready = threading.Event()
    server = page.Server(page.app(sessions, memory.told, "127.0.0.1"), "127.0.0.1", 0, ready.set, sessions.cancel_all)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def answer(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as found:
            return found.status, found.headers, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, ""


def test_the_server_shows_the_page_and_nothing_else_of_the_machine(address, tmp_path):
    status, headers, text = answer(address)
    assert status == 200 and "dense-sparse" in text
    assert "default-src 'self'" in headers["content-security-policy"]
    config = json.loads(answer(f"{address}/config")[2])
    assert config["analytics_enabled"] is False and not config.get("share")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for way in ("file=", "file/", "gradio_api/file=", "gradio_api/file/", "gradio_api/proxy=", "gradio_api/download/"):
        for place in (secret, __file__, "/etc/passwd", "pyproject.toml", f"{address}/config"):
            assert answer(f"{address}/{way}{place}")[0] == 404
    assert answer(f"{address}/gradio_api/upload")[0] == 404
    assert answer(address, Host="elsewhere.example")[0] == 400


@pytest.fixture
def browser(address):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if BROWSER is None:
        pytest.skip("there is no chromium (apt install chromium)")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        visit = made.new_page(viewport={"width": 1360, "height": 1000})
        visit.outside, visit.errors = [], []
        visit.on("request", lambda r: visit.outside.append(r.url) if r.url.startswith("http") else None)
        visit.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.goto(address)
        visit.wait_for_selector("#run")
        yield visit
        assert not visit.errors
        assert all(url.startswith(address) for url in visit.outside)
        made.close()


@pytest.mark.slow
def test_a_visitor_makes_both_clips_looks_at_them_and_changes_the_sparsity(browser, session):
    browser.fill("#prompt textarea", "a red circle moves right")
    browser.click("#run")
    browser.wait_for_selector("#figures .tile", timeout=60_000)
    names = browser.locator("#figures .tile span").all_inner_texts()
    assert names == ["speed-up", "attention alone", "PSNR", "SSIM", "density"]
    clips = "[...document.querySelectorAll('dense-sparse video')]"
    browser.wait_for_function(f"{clips}.length == 3 && {clips}.every(clip => clip.readyState >= 2)")

    browser.click("dense-sparse .play")
    browser.locator("dense-sparse .moment").fill("5")
    browser.wait_for_function("document.querySelector('dense-sparse output').textContent == 'frame 6 of 9'")
    assert len({round(at, 3) for at in browser.evaluate(f"{clips}.map(clip => clip.currentTime)")}) == 1
    browser.locator("dense-sparse .wipe").fill("20")
    assert "20%" in browser.evaluate("getComputedStyle(document.querySelector('dense-sparse .sparse')).clipPath")
    shown = "getComputedStyle(document.querySelector('dense-sparse .difference')).display"
    assert browser.evaluate(shown) == "none"
    browser.click("dense-sparse [data-mode=difference]")
    assert browser.evaluate(shown) == "block"
    with browser.expect_download() as saved:
        browser.click("dense-sparse a[data-of=sparse]")
    assert saved.value.suggested_filename == "a-red-circle-moves-right-sparse.mp4"

    browser.locator("#sparsity input[type=number]").fill("0.5")
    browser.click("#run")
    browser.wait_for_selector("text=the dense clip is that of an earlier run", timeout=60_000)
    assert browser.locator("dense-sparse .of-sparse").inner_text() == "sparsity 0.5"
    assert len(session._runs) == 1


@pytest.mark.slow
def test_a_mistake_is_told_and_cancel_ends_the_run(browser, session):
    browser.get_by_label("Frames", exact=True).fill("8")
    browser.fill("#prompt textarea", "a red circle")
    browser.click("#run")
    browser.wait_for_selector("text=frames must be a multiple of 4 plus 1 for this model, got 8 (nearest: 9)")

    browser.get_by_label("Frames", exact=True).fill("9")
    browser.get_by_label("Steps", exact=True).fill("500")
    browser.click("#run")
    browser.wait_for_selector("text=/dense: step \\d+ of 500, \\d+ s left/", timeout=60_000)
    browser.click("#cancel")
    browser.wait_for_function("!document.body.innerText.includes('of 500')")
    assert session._lock.acquire(timeout=10)  # the run has ended, in the server too
    session._lock.release()
    assert not session._runs and not session._asked_to_stop


@pytest.mark.slow
def test_another_model_is_loaded_when_it_is_chosen_and_its_sizes_are_shown(browser, sessions):
    def choose(name):
        browser.get_by_label("Model", exact=True).click()
        browser.get_by_role("option", name=name, exact=True).click()

    frames = browser.get_by_label("Frames", exact=True)
    assert frames.input_value() == "9"
    choose("broken")
    browser.wait_for_selector("text=model 'broken' cannot be loaded: no such file")
    assert frames.input_value() == "9"
    choose("other")
    browser.wait_for_function("[...document.querySelectorAll('input')].some(one => one.value == '5')")
    assert frames.input_value() == "5" and sessions.of("other").model.name == "other"
    browser.fill("#prompt textarea", "a red circle")
    browser.click("#run")
    browser.wait_for_selector("#figures .tile", timeout=60_000)
    assert browser.locator("dense-sparse").get_attribute("data-frames") == "5"
