"""The Lightning side: the queue and the callback."""
