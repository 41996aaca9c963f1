"""The agent that runs in a Linux guest: its frames, what it reads there, and the program itself."""
