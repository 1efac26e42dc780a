"""What a video file raises that cannot be used."""


class CorruptVideo(Exception):
    """A video file that cannot be used; its only argument is the reason, without the file's name."""
