"""What SAEs are judged by, and what is done with their latents."""
