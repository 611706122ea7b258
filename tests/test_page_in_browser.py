"""The page of `clapsep ui` in a headless Chromium, from opening a recording to downloading a part of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, Browser
from conftest import Clapsep

pytest.importorskip("starlette", reason="the page takes the packages of clapsep[ui]")
pytest.importorskip("uvicorn", reason="the page takes the packages of clapsep[ui]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

ROOT = Path(__file__).parents[1]
SHIFT, CTRL = 8, 2


@dataclass
class Shown:
    """The page in a browser; `app` is its own module."""

    browser: Browser
    mix: Path

    def app(self, script: str) -> Any:
        """The value of an expression in which `app` is the page's module."""
        return self.browser.evaluate(
            f"(async () => {{ const app = await import('/static/app.js'); return {script}; }})()"
        )

    def text(self, selector: str) -> Any:
        return self.browser.evaluate(f"document.querySelector({selector!r}).innerText")

    def complaints(self) -> list[str]:
        """What the console was told, but for answers that came too late: about sounds that were removed meanwhile."""
        state = self.browser.evaluate("fetch('/api/state').then((answer) => answer.text())")
        late = [re.search(r"\(Not Found\) \S+/api/sounds/(\w+)/", one) for one in self.browser.complaints]
        return [one for one, of in zip(self.browser.complaints, late, strict=True) if of is None or of[1] in state]

    def wait_for_gains(self, *gains: float) -> None:
        """Wait until the parts are heard with these gains, which takes some hundredths of a second."""
        script = "(await import('/static/app.js')).player.deck.gains.map((one) => one.gain.value)"
        self.browser.wait(script, lambda now: now == pytest.approx(gains, abs=1e-3))

    def slide(self, percent: int) -> None:
        """Say how much of the rest is heard."""
        self.browser.evaluate(
            "(() => { const one = document.querySelector('#bleed');"
            f"one.value = {percent}; one.dispatchEvent(new Event('input')); }})()"
        )

    def span(self, at: float, to: float, modifiers: int = 0) -> None:
        """Drag over the picture, between two shares of its width."""
        x, y, width, _ = self.browser.box("#stage")
        steps = [(x + width * (at + (to - at) * share), y + 60) for share in (0, 0.3, 0.7, 1)]
        self.browser.drag(*steps, modifiers=modifiers)


@pytest.fixture
def shown(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shown]:
    """The page with a recording open; the parameter, if there is one, is the fixture of its model."""
    model = str(request.getfixturevalue(request.param)) if hasattr(request, "param") else "mini"
    mix = tmp_path / "mix.flac"
    shutil.copy(ROOT / "examples" / "mix.flac", mix)
    process = subprocess.Popen(
        [sys.executable, "-m", "clapsep_cli", "ui", "mix.flac", "--no-browser", "--model", model, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CLAPSEP_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address = re.search(r"http\S+", process.stdout.readline())
        assert address is not None
        with Browser(tmp_path / "profile") as browser:
            browser.look(1280, 860)
            browser.open(address[0])
            page = Shown(browser, mix)
            browser.wait("!document.querySelector('#work').hidden")
            page.app("(await app.stage.picture.show(app.stage.picture.sound, app.stage.top), 1)")
            yield page
            assert page.complaints() == []
            outside = [one for one in browser.requests if not one.startswith(address[0].partition("?")[0])]
            assert outside == [], "no request leaves the machine"
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
    assert not list((tmp_path / "home" / "page").iterdir())


def test_from_a_recording_to_its_parts(shown: Shown, clapsep: Clapsep) -> None:
    browser = shown.browser
    assert browser.evaluate("location.href").endswith("/"), "the key does not stay in the address"
    assert shown.text("#name") == "mix.flac"
    shown.span(0.09, 0.18)
    shown.span(0.3, 0.32, modifiers=SHIFT)
    kept, left = (browser.evaluate(f"document.querySelectorAll('.{side} li').length") for side in ("keep", "leave"))
    assert (kept, left) == (1, 1)
    colours = shown.app("app.stage.regions.getRegions().map((one) => one.element.getAttribute('part'))")
    assert colours == ["region keep", "region leave"]
    browser.click(".leave li button[aria-label^=Remove]")
    assert shown.app("app.stage.regions.getRegions().length") == 1
    browser.type("input[name=keep]", "dog barking")
    browser.press("Enter")
    browser.type("input[name=leave]", "rain")
    browser.press("Enter", CTRL)
    browser.wait("document.querySelector('.attempt.done') !== null", seconds=120)
    assert re.match(r"1\. dog barking, like 0\.\d+–1\.\d+ s without rain", shown.text(".attempt .title"))
    assert "there" in shown.text(".presence")
    hear_and_switch(shown)
    compare(shown)
    download(shown, clapsep)
    look(shown)
    another(shown)


@pytest.mark.parametrize("shown", ["audiosep_folder"], indirect=True)
def test_what_a_model_does_not_take_is_out_of_use(shown: Shown) -> None:
    left = "document.querySelector('.side.leave').disabled"
    assert shown.text("#takes").endswith("takes words alone: no examples and no stretches, nothing to leave.")
    assert shown.browser.evaluate(left)
    choose = "const one = document.querySelector('#model'); one.value = 'mini'; one.dispatchEvent(new Event('change'));"
    shown.browser.evaluate(f"(() => {{ {choose} }})()")
    assert shown.browser.evaluate("document.querySelector('#takes').hidden")
    assert not shown.browser.evaluate(left)


def hear_and_switch(shown: Shown) -> None:
    browser = shown.browser
    browser.evaluate("document.activeElement.blur()")
    browser.press(" ")
    browser.wait("document.querySelector('#play.playing') !== null")
    browser.wait("(await import('/static/app.js')).player.currentTime > 0.1")
    before, deck = shown.app("app.player.currentTime"), "app.player.deck.begun ??= crypto.randomUUID()"
    first = shown.app(deck)
    for key, gains in (("1", [1, 1]), ("2", [1, 0]), ("3", [0, 1]), ("2", [1, 0])):
        browser.press(key)
        shown.wait_for_gains(*gains)
        chosen = browser.evaluate("[...document.querySelectorAll('#listen button')].map((one) => one.ariaPressed)")
        assert chosen.index("true") == int(key) - 1
    shown.slide(25)
    shown.wait_for_gains(1, 0.25)
    assert shown.text("#bleed-value") == "25 %"
    assert shown.app(deck) == first, "the parts are played by one clock all the while"
    after = shown.app("app.player.currentTime")
    assert before < after < before + 20
    assert after == pytest.approx(shown.app("app.player.currentTime"), abs=1)
    shown.slide(0)
    sound = """(async () => {
        const { player } = app;
        player.currentTime = 1;
        await new Promise((done) => setTimeout(done, 400));
        const meters = ['1', '2', '3'].map(() => 0);
        for (const [index, heard] of [-1, 0, 1].entries()) {
            app.hear(heard);
            const meter = new AnalyserNode(player.context, { fftSize: 8192 });
            const samples = new Float32Array(8192);
            for (let tries = 0; tries < 20 && meters[index] <= 0.01; tries++) {
                player.deck.fader.connect(meter);
                await new Promise((done) => setTimeout(done, 350));
                meter.getFloatTimeDomainData(samples);
                meters[index] = Math.hypot(...samples);
            }
        }
        return meters;
    })()"""
    assert min(shown.app(f"await {sound}")) > 0.01, "something is heard of each"
    browser.press(" ")
    browser.wait("document.querySelector('#play.playing') === null")


def compare(shown: Shown) -> None:
    """A second attempt, by an example and marked by keys, and back and forth between the two while they play."""
    browser = shown.browser
    browser.choose(".leave input[type=file]", ROOT / "examples" / "rain.flac")
    browser.wait("document.querySelector('.side.leave').innerText.includes('rain.flac')")
    browser.press("0")
    shown.app("(app.player.currentTime = 3.2, 1)")
    browser.press("k")
    shown.app("(app.player.currentTime = 3.8, 1)")
    browser.press("k")
    assert browser.evaluate("document.querySelectorAll('.keep li').length") == 3
    browser.click("#several")
    browser.evaluate("document.querySelectorAll('.keep li button[aria-label^=Remove]')[0].click()")
    browser.evaluate("document.querySelector('#refine').value = 'true'")
    browser.click("#extract")
    browser.wait("document.querySelectorAll('.attempt.done').length === 2", seconds=120)
    assert browser.evaluate("document.querySelectorAll('#listen button').length") == 4
    browser.evaluate("document.activeElement.blur()")
    browser.press(" ")
    browser.wait("(await import('/static/app.js')).player.deck !== null")
    at = shown.app("app.player.currentTime")
    for count in (2, 3, 2):
        browser.press("b")
        browser.wait(f"(await import('/static/app.js')).player.deck?.parts.length === {count}")
        assert not shown.app("app.player.paused")
    assert at <= shown.app("app.player.currentTime") < at + 10
    browser.press(" ")
    without_a_gap(shown)


# Plays the mixture from 2 s on, changes the attempt meanwhile, and returns the last 0.7 s that were heard.
CHANGE = """(async () => {
    const { attempts, hear, player } = app;
    hear(-1);
    await new Promise((done) => setTimeout(done, 100));
    player.currentTime = 2;
    await player.play();
    const meter = new AnalyserNode(player.context, { fftSize: 32768 });
    const mute = new GainNode(player.context, { gain: 0 });
    meter.connect(mute).connect(player.context.destination);
    const [before, Deck] = [player.deck, player.deck.constructor];
    const { start } = Deck.prototype;
    Deck.prototype.start = function (...when) { this.fader.connect(meter); start.apply(this, when); };
    before.fader.connect(meter);
    await new Promise((done) => setTimeout(done, 700));
    attempts.swap();
    while (player.deck === before) await new Promise((done) => setTimeout(done, 5));
    await new Promise((done) => setTimeout(done, 300));
    const samples = new Float32Array(32768);
    meter.getFloatTimeDomainData(samples);
    Deck.prototype.start = start;
    player.pause();
    return Array.from(samples);
})()"""


def without_a_gap(shown: Shown) -> None:
    """The mixture is heard sample by sample, though another attempt's parts make it up from some moment on.

    A machine that is too busy to play in real time gets more tries.
    """
    mixture = soundfile.read(shown.mix, dtype="float32")[0]
    worst = []
    for _ in range(4):
        heard = np.asarray(shown.app(f"await {CHANGE}"), np.float32)
        spectra = np.fft.rfft(mixture, 1 << 20) * np.conj(np.fft.rfft(heard, 1 << 20))
        expected = mixture[int(np.fft.irfft(spectra).argmax()) :][: len(heard)]
        worst.append(float(abs(heard[: len(expected)] - expected).max()) if len(expected) == len(heard) else 1.0)
        if worst[-1] <= 1e-6:
            return
    raise AssertionError(f"off by {worst}")


def download(shown: Shown, clapsep: Clapsep) -> None:
    """What the page links to holds the samples that the command it shows writes."""
    shown.browser.wait("document.querySelectorAll('.attempt.done').length === 2")
    named = shown.app("app.attempts.all[1].command")
    assert " --target 'dog_barking=dog barking' --target at_3.2_s=3.2-3.8 --neg rain --neg-audio rain.flac " in named
    assert " --refine " in named
    assert "two passes" in shown.text(".attempt:first-child .actions")
    assert "two passes" not in shown.text(".attempt:last-child .actions")
    command, link = shown.app("[app.attempts.all[0].command, app.attempts.all[0].parts[0].id]")
    read = f"Array.from(new Uint8Array(await (await fetch('/api/sounds/{link}/file')).arrayBuffer()))"
    downloaded = shown.mix.with_name("downloaded.flac")
    downloaded.write_bytes(bytes(shown.browser.evaluate(read)))
    done = clapsep(*shlex.split(command)[1:], cwd=shown.mix.parent)
    assert done.returncode == 0, done.stderr
    written = soundfile.read(shown.mix.with_name("mix.target.flac"), dtype="int16")[0]
    np.testing.assert_array_equal(soundfile.read(downloaded, dtype="int16")[0], written)
    shown.browser.evaluate("document.querySelector('.attempt.current .actions button:last-of-type').click()")
    shown.browser.wait("document.querySelectorAll('.attempt').length === 1")
    assert shown.browser.evaluate("document.querySelectorAll('#listen button').length") == 1


def look(shown: Shown) -> None:
    """Dark, and as wide as a phone: nothing is cut off."""
    browser = shown.browser
    backs = []
    for dark in (False, True):
        browser.look(1280, 860, dark=dark)
        backs.append(browser.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", back))) for back in backs)
    assert light > 600 > 150 > dark
    browser.look(375, 720, phone=True)
    browser.wait("document.documentElement.clientWidth === 375")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 375
    small = """[...document.querySelectorAll('button, input, select')].filter((one) => one.checkVisibility())
        .filter((one) => one.getBoundingClientRect().right > 376).map((one) => one.outerHTML)"""
    assert browser.evaluate(small) == []
    nameless = """[...document.querySelectorAll('button, input:not([hidden]), select, progress')]
        .filter((one) => !(one.ariaLabel || one.innerText?.trim() || one.labels?.length)).map((one) => one.outerHTML)"""
    assert browser.evaluate(nameless) == [], "everything has a name for a screen reader"
    out_of_reach = """[...document.querySelectorAll('#work input, #work select, header input')]
        .filter((one) => one.checkVisibility() || one.type === 'file')
        .filter((one) => (one.focus(), document.activeElement !== one)).map((one) => one.outerHTML)"""
    assert browser.evaluate(out_of_reach) == [], "everything is reached by keys"


def another(shown: Shown) -> None:
    """Another recording in place of the first, while the picture of that may still be asked for."""
    browser = shown.browser
    browser.evaluate("document.querySelector('.attempt .actions button:last-of-type').click()")
    browser.wait("document.querySelectorAll('.attempt').length === 0")
    browser.click("#zoom-in")
    browser.choose("#open", ROOT / "examples" / "dog.flac")
    browser.wait("document.querySelector('#name').innerText === 'dog.flac'")
    browser.wait("document.querySelectorAll('#listen button').length === 1")
    assert browser.evaluate("document.querySelector('.keep ul').innerText.includes('stretch')") is False
    assert shown.app("app.stage.regions.getRegions().length") == 0
    assert browser.evaluate("document.querySelector('#banner').hidden")
