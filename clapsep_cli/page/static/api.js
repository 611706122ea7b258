// What the page asks of its server. Every failure becomes an Error with one line to show.

const CHANGE = { 'X-Clapsep': '1' };

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw Object.assign(new Error('clapsep ui has ended. Start it again in the terminal.'), { ended: true });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error ?? `the server answered ${answer.status}`);
}

const asked = (path, method, body, headers = {}) =>
  ask(path, { method, body, headers: { ...CHANGE, ...headers } }).then((answer) => answer.json());

export const getState = () => ask('/api/state').then((answer) => answer.json());
export const extract = (wish) => asked('/api/attempts', 'POST', JSON.stringify(wish));
export const cancel = (id) => asked(`/api/attempts/${id}/cancel`, 'POST');
export const removeAttempt = (id) => asked(`/api/attempts/${id}`, 'DELETE');
export const removeShot = (id) => asked(`/api/shots/${id}`, 'DELETE');
export const openRecording = (file) => upload('/api/recording', file);
export const chooseTrack = (number) => asked(`/api/recording/tracks/${number}`, 'POST');
export const addShot = (file) => upload('/api/shots', file);
export const fileOf = (id) => `/api/sounds/${id}/file`;

function upload(path, file) {
  return asked(path, 'POST', file, { 'X-Name': encodeURIComponent(file.name), 'Content-Type': 'application/octet-stream' });
}

// Of a sound; an error says of which.
async function bytes(sound, path, signal) {
  try {
    return await (await ask(`/api/sounds/${sound}/${path}`, { signal })).arrayBuffer();
  } catch (error) {
    throw Object.assign(error, { sound });
  }
}

export const getPeaks = (id) => bytes(id, 'peaks').then((data) => new Int8Array(data));

export const getPicture = (id, from, to, columns, signal) =>
  bytes(id, `picture?from=${from}&to=${to}&columns=${columns}`, signal).then((data) => new Uint8Array(data));

export const getSamples = (id, start, frames, signal) =>
  bytes(id, `samples?start=${start}&frames=${frames}`, signal).then((data) => new Float32Array(data));
