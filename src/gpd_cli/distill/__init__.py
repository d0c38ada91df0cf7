"""The losses of student and dynamic teacher, from each other and from static teachers."""
