"""Speak texts with the eSpeak NG library, in a process of its own: a library that crashes takes only that down.

    python -m triweave.data_pipeline.fetch.espeak_process LIBRARY DATA_PARENT VOICE < jobs

jobs: a JSON list of [text, WAV path]. Clips are mono, 16 bit, at the library's rate. Exits with 1 and one line on
standard error when a text cannot be spoken.
"""

from __future__ import annotations

import ctypes
import json
import sys
import wave
from collections.abc import Iterator

_SYNCHRONOUS = 2
_DO_NOT_EXIT = 0x8000
_UTF8 = 1
_POSITION_IN_CHARACTERS = 1
_SAMPLE_BYTES = 2
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class SpeechError(Exception):
    """The library refused."""


def speak(library: str, data_parent: str, voice: str, texts: list[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (rate in Hz, 16-bit samples) of every text. Raises SpeechError, OSError where there is no such library."""
    espeak = ctypes.CDLL(library)
    espeak.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    espeak.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    espeak.espeak_SetSynthCallback.argtypes = [_Callback]
    espeak.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
    ]
    rate_hz = espeak.espeak_Initialize(_SYNCHRONOUS, 0, data_parent.encode(), _DO_NOT_EXIT)
    if rate_hz <= 0:
        raise SpeechError(f"no usable espeak-ng-data in {data_parent}")
    samples = bytearray()

    def take(block: int | None, count: int, _events: int | None) -> int:
        if block and count > 0:
            samples.extend(ctypes.string_at(block, count * _SAMPLE_BYTES))
        return 0

    callback = _Callback(take)  # the library keeps the pointer, so this name must live on
    espeak.espeak_SetSynthCallback(callback)
    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise SpeechError(f"no voice {voice}")
    for text in texts:
        samples.clear()
        data = text.encode() + b"\0"
        status = espeak.espeak_Synth(data, len(data), 0, _POSITION_IN_CHARACTERS, 0, _UTF8, None, None)
        if status != 0 or espeak.espeak_Synchronize() != 0 or not samples:
            raise SpeechError(f"{text!r} cannot be spoken (status {status})")
        yield rate_hz, bytes(samples)


def main(arguments: list[str]) -> int:
    """Do the jobs on standard input; return the exit code."""
    library, data_parent, voice = arguments
    jobs = json.load(sys.stdin)
    try:
        clips = speak(library, data_parent, voice, [text for text, _ in jobs])
        for (_, path), (rate_hz, samples) in zip(jobs, clips, strict=True):
            with wave.open(path, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(_SAMPLE_BYTES)
                file.setframerate(rate_hz)
                file.writeframes(samples)
    except (SpeechError, OSError, AttributeError) as error:  # AttributeError: another library, without these functions
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
