"""What deploy/validate runs: every module looks at one thing and gives problems as lines of text."""
