"""What student and dynamic teacher learn, from each other and from static teachers."""
