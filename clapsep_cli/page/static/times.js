// Times as people read and type them.

export function clock(seconds) {
  const tenths = Math.floor(seconds * 10 + 1e-6);
  const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, '0');
  return hours ? `${hours}:${String(minutes).padStart(2, '0')}:${rest}` : `${minutes}:${rest}`;
}

export const short = (seconds) => String(Number(seconds.toFixed(seconds < 1000 ? 2 : 1)));

// Seconds of 83.5, 1:23.5 or 1:02:03; NaN for anything else.
export function parse(text) {
  const pieces = text.trim().split(':');
  if (pieces.length > 3 || pieces.some((piece) => !/^\d+(\.\d*)?$/.test(piece))) return NaN;
  return pieces.reduce((sum, piece) => sum * 60 + Number(piece), 0);
}

// A time under the picture, where there is one each `step` seconds.
export function tick(seconds, step) {
  const digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
  const whole = Math.floor(seconds + 1e-6);
  const part = digits ? (seconds - whole).toFixed(digits).replace(/^-?0/, '') : '';
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const pad = (number) => String(number).padStart(2, '0');
  return (hours ? `${hours}:${pad(minutes)}:${pad(rest)}` : `${minutes}:${pad(rest)}`) + part;
}
