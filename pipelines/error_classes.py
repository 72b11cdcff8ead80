"""The classes of errors that a recording can end in: what a row's `error` holds. A leaf."""

ERROR_CLASSES: dict[str, str] = {
    "empty": "The file, member or cell holds no bytes.",
    "not-audio": "The bytes are no audio that wavemill knows: text, a web page, a playlist, headerless samples.",
    "no-samples": "A header is there and in order, but no sound follows it.",
    "truncated": "The recording ends before what its header promises, or in the middle of something.",
    "corrupt": "Decoding failed, or a checksum does not match: bytes inside the recording are damaged.",
    "length-mismatch": "Decoding gives more or fewer samples than the header promises, and nothing is cut off.",
    "unsupported": "Audio of a kind that is not read: a codec without a decoder, a sample rate or channel count out of "
    "range, or one that changes inside the recording.",
    "too-large": "The recording is beyond a limit for bytes, duration or decoded bytes per byte.",
    "changed": "The bytes are not those that the corpus was built of.",
    "missing": "The file or member is not there (any more).",
    "unreadable": "The file cannot be opened or read: permissions, a broken disk, a damaged container.",
    "not-a-file": "The path leads to a folder, a device or a pipe.",
    "outside-source": "The path leads out of its source's folder.",
    "bad-name": "The file's name is no UTF-8.",
    "bad-row": "A row of a table or a line of a manifest does not say where its audio is.",
    "unsafe-name": "A tar member's name leads out of the tar, or the member is a link or a device.",
    "duplicate-member": "A tar holds two members of one name; the first is used.",
    "out-of-range": "A manifest names a part or a channel that the recording does not have.",
    "too-long": "The segment is longer than one may be; build the corpus with windows or speech spans.",
    "non-finite": "There are samples that are NaN, infinite or far beyond full scale.",
    "decoder-hang": "The decoder gave no sign of life and was stopped.",
    "decoder-crash": "The decoder died of this recording, twice.",
    "decoder-memory": "The decoder needs more memory than it may have for this recording.",
}
