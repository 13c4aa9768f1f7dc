"""Videos: read frame by frame, and written anew with other pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from dynamicvit.io.files import written_whole

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
_BATCH = 16  # frames in memory at a time
_CLOCK = Fraction(1, 90_000)  # seconds a tick: of what is written, fine enough for any frame rate


def check_video(source: Path) -> None:
    """Raise ValueError unless the first frame of a video can be read."""
    av = import_av()
    try:
        with av.open(str(source)) as film:
            next(_frames(film))
    except (av.FFmpegError, StopIteration) as error:
        raise ValueError(f"cannot read video {source}: {error or 'no frames'}") from error


def redraw_video(
    source: Path, target: Path, draw: Callable[[Sequence[Image.Image]], Sequence[Image.Image]]
) -> Iterator[int]:
    """Write an MP4 (H.264) with a picture instead of each frame; without sound.

    Frames keep their times. The file is there once the iterator has ended.

    Args:
        source: the video.
        target: file to write.
        draw: upright frames → as many pictures, all of one size.

    Yields:
        After each frame, how many there have been.

    Raises:
        ValueError: if the file cannot be read, or holds no picture.
        OSError: naming the target, if it cannot be written.
    """
    av = import_av()
    try:
        with written_whole(target) as temporary, av.open(str(source)) as film:
            decoded, count, last = _frames(film), 0, -1
            stream: Any = None
            with av.open(str(temporary), "w", format="mp4") as result:
                while frames := list(itertools.islice(decoded, _BATCH)):
                    images = [_upright(frame) for frame in frames]
                    for frame, picture in zip(frames, draw(images), strict=True):
                        if stream is None:
                            stream = result.add_stream("libx264", options={"crf": "18"})
                            # This form of colours is the one that every player knows. It needs an
                            # even width and height.
                            stream.pix_fmt = "yuv420p"
                            stream.width, stream.height = (side + side % 2 for side in picture.size)
                            stream.codec_context.time_base = _CLOCK
                        shown = Image.new("RGB", (stream.width, stream.height), "white")
                        shown.paste(picture)
                        # Some files have no times, or the same time twice, which cannot be written.
                        seconds = count / 25 if frame.time is None else frame.time
                        last = max(last + 1, round(seconds / _CLOCK))
                        written = av.VideoFrame.from_image(shown)
                        written.pts, written.time_base = last, _CLOCK
                        result.mux(stream.encode(written))
                        count += 1
                        yield count
                if stream is None:
                    raise ValueError("no frames")
                result.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        # FFmpeg's errors of writing, such as of a full disk, name the temporary file.
        if isinstance(error, OSError) and error.filename not in (None, str(source)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise ValueError(f"cannot explain video {source}: {error}") from error


def _frames(film: Any) -> Iterator[Any]:
    for stream in film.streams.video[:1]:
        yield from film.decode(stream)


def _upright(frame: Any) -> Image.Image:
    """A frame, turned by the rotation stored in the metadata."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def import_av() -> Any:
    try:
        import av  # an extra
    except ImportError as error:
        raise ValueError("video files need the extra: pip install 'dynamicvit[video]'") from error
    return av
