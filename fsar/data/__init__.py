"""Split lists, video files, the motions benchmark, prepared stores and episodes."""
