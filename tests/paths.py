"""Names that try to lead out of a folder."""

from __future__ import annotations

TRAVERSALS = (
    "..", "../secret", "../../etc/passwd", "case_0/../../secret", "/etc/passwd", "/secret",
    "~", "~/secret", "~root/secret", "$HOME/secret", "file:///etc/passwd", "file://secret",
    "C:\\secret", "..\\secret", "%2e%2e/secret", "%2e%2e%2fsecret", "..%00", "case_0\0/../secret",
    "case_0\n../secret", "\u2024\u2024/secret", "\uff0e\uff0e/secret", ".", "./../secret",
    ".secret", "a" * 5000, "",
)  # fmt: skip
